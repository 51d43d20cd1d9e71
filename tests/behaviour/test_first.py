"""The shortest way through each endpoint."""

from tests.harness import Server


def test_a_published_message_reaches_every_endpoint_at_once(server: Server) -> None:
    with server.client() as test, server.client() as lines, server.client() as poll, server.events("user:7") as events:
        test.ask("GET", "/test/7")
        assert test.read_head().status == 200
        assert test.read_chunk() == b"comet welcomes you! Your id: 7\n"
        lines.ask("GET", "/stream/user:7")
        assert lines.read_head().status == 200
        assert lines.read_chunk() == b"\n"
        poll.ask("GET", "/poll/user:7")
        from tests.harness import wait_until

        wait_until(lambda: server.clients() == 4)
        sent = server.request("POST", "/send/7", b"hello").json
        assert sent["delivered"] == 4
        assert test.read_chunk() == b"hello\n"
        assert sent["id"].encode() in lines.read_chunk()
        assert poll.read().json["messages"][0]["data"] == "hello"
        assert events.next().data == "hello"
