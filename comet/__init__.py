"""comet: pushes messages to very many HTTP clients.

How a message gets from a publisher to a client:

    handlers.publish            reads and checks the request
    hub.publish                 passes it on
    backplane.publish           orders it: the next offset of the channel's log (history)
    hub.deliver                 finds the channel's subscribers here
    fanout                      hands them the batch: few at once, many in slices
    subscriber.deliver          asleep: server.parking writes it to the socket
                                awake: a queue, which the client's greenlet takes from and writes
    framing                     makes the bytes, once for all who get the same

and how a client gets there:

    server.wsgi, connection     accepts, and reads the head: the short way (server.short) or server.http
    handlers.poll, stream       the channels and the cursor: a wish
    hub.subscribe               registers, then joins: the backplane answers with what was missed
    server.connection           writes that, and when nothing waits any more:
    server.parking              sleeps, until a message, a request, a hang-up or a deadline
"""
