import { createEventSource } from "eventsource-client"

const [url, last] = process.argv.slice(2)
const say = (line) => console.log(JSON.stringify(line))

const source = createEventSource({
  url,
  initialLastEventId: last,
  onConnect: () => say({ event: "open" }),
  onDisconnect: () => say({ event: "error" }),
})
for await (const { data, event, id } of source) {
  if (event === undefined || event === "message") say({ event: "message", id, data })
  else if (event === "gap") say({ event: "gap", id, data })
  else say({ event: "other", name: event, id, data })
}
say({ event: "end" })
