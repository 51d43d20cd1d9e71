// A long poll with fetch. What it does when something fails is this program's own: it waits and asks again, with the same cursor.
import { setTimeout as wait } from "node:timers/promises"

const [url, last] = process.argv.slice(2)
const say = (line) => console.log(JSON.stringify(line))

let cursor = last
for (;;) {
  try {
    const response = await fetch(cursor ? `${url}?since=${cursor}&timeout=10` : `${url}?timeout=0`)
    if (!response.ok) {
      say({ event: "refused", status: response.status, data: await response.text() })
      await wait(1000 * Number(response.headers.get("Retry-After") ?? 1))
      continue
    }
    const answer = await response.json()
    if (cursor === undefined) say({ event: "open" })
    if (answer.gap) say({ event: "gap", id: answer.cursor })
    for (const message of answer.messages) say({ event: "message", id: message.id, data: message.data })
    cursor = answer.cursor
  } catch (error) {
    say({ event: "error", error: String(error.cause ?? error) })
    await wait(500)
  }
}
