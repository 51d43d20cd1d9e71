// go-sse, as its README has it: the default client, which reconnects by itself.
package main

import (
	"encoding/json"
	"net/http"
	"os"

	"github.com/tmaxmax/go-sse"
)

func say(line map[string]any) {
	_ = json.NewEncoder(os.Stdout).Encode(line)
}

func main() {
	r, _ := http.NewRequest(http.MethodGet, os.Args[1], nil)
	if len(os.Args) > 2 {
		r.Header.Set("Last-Event-ID", os.Args[2])
	}
	conn := sse.NewConnection(r)

	conn.SubscribeToAll(func(ev sse.Event) {
		switch ev.Type {
		case "", "message":
			say(map[string]any{"event": "message", "id": ev.LastEventID, "data": ev.Data})
		case "gap":
			say(map[string]any{"event": "gap", "id": ev.LastEventID, "data": ev.Data})
		default:
			say(map[string]any{"event": "other", "name": ev.Type, "id": ev.LastEventID, "data": ev.Data})
		}
	})

	err := conn.Connect()
	say(map[string]any{"event": "end", "error": err.Error()})
}
