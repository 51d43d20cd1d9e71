import { EventSource } from "eventsource"

const [url, last] = process.argv.slice(2)
const say = (line) => console.log(JSON.stringify(line))

const source = new EventSource(last ? `${url}?lastEventId=${encodeURIComponent(last)}` : url)
source.addEventListener("open", () => say({ event: "open" }))
source.addEventListener("message", (event) => say({ event: "message", id: event.lastEventId, data: event.data }))
source.addEventListener("gap", (event) => say({ event: "gap", id: event.lastEventId, data: event.data }))
source.addEventListener("error", (event) =>
  say({ event: source.readyState === EventSource.CLOSED ? "end" : "error", code: event.code, error: event.message }),
)
