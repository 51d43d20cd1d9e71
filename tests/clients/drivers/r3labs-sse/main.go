// r3labs/sse, as its README has it, without the stream's name in the query.
package main

import (
	"encoding/json"
	"os"

	"github.com/r3labs/sse/v2"
)

func say(line map[string]any) {
	_ = json.NewEncoder(os.Stdout).Encode(line)
}

func main() {
	client := sse.NewClient(os.Args[1])
	if len(os.Args) > 2 {
		client.LastEventID.Store([]byte(os.Args[2]))
	}

	err := client.SubscribeRaw(func(msg *sse.Event) {
		switch string(msg.Event) {
		case "", "message":
			say(map[string]any{"event": "message", "id": string(msg.ID), "data": string(msg.Data)})
		case "gap":
			say(map[string]any{"event": "gap", "id": string(msg.ID), "data": string(msg.Data)})
		default:
			say(map[string]any{"event": "other", "name": string(msg.Event), "id": string(msg.ID), "data": string(msg.Data)})
		}
	})
	if err != nil {
		say(map[string]any{"event": "end", "error": err.Error()})
	} else {
		say(map[string]any{"event": "end"})
	}
}
