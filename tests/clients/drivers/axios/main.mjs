// A long poll with axios. What it does when something fails is this program's own: it waits and asks again, with the same cursor.
import axios from "axios"
import { setTimeout as wait } from "node:timers/promises"

const [url, last] = process.argv.slice(2)
const say = (line) => console.log(JSON.stringify(line))

let cursor = last
for (;;) {
  try {
    const { data: answer } = await axios.get(url, { params: cursor ? { since: cursor, timeout: 10 } : { timeout: 0 } })
    if (cursor === undefined) say({ event: "open" })
    if (answer.gap) say({ event: "gap", id: answer.cursor })
    for (const message of answer.messages) say({ event: "message", id: message.id, data: message.data })
    cursor = answer.cursor
  } catch (error) {
    if (error.response) {
      say({ event: "refused", status: error.response.status, data: error.response.data })
      await wait(1000 * Number(error.response.headers["retry-after"] ?? 1))
    } else {
      say({ event: "error", error: String(error) })
      await wait(500)
    }
  }
}
