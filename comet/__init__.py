"""comet: pushes messages to very many HTTP clients.

How a message gets from a publisher to a client:

    handlers.publish        reads and checks the request
    hub.publish             passes it on
    backplane.publish       orders it: the next offset of the channel's log (history)
    hub.deliver             offers the ordered message to the channel's subscribers here
    subscriber.offer        queues it for one client, without blocking
    subscriber.__iter__     in the client's greenlet: takes what waits, framing makes bytes of it
    server.wsgi             writes them

and how a client gets there:

    server.wsgi             accepts, reads the head (server.http), calls bottle
    handlers.poll, stream   the channels and the cursor
    hub.subscribe           registers, then joins: the backplane answers with what was missed
    server.wsgi.park        watches for a hang-up (server.parking) and iterates
"""
