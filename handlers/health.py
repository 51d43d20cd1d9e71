"""Is it alive, is it ready, what has it done."""

from bottle import HTTPResponse

from comet.errors import Refusal
from handlers.params import Context, answer


def alive(context: Context) -> HTTPResponse:
    """GET /healthz: the process answers; `worker` says which, of several behind one address."""
    return answer({"status": "alive", "worker": context.worker})


def ready(context: Context) -> HTTPResponse:
    """GET /readyz: it takes subscribers; Refusal ``draining`` once it is stopping, ``backplane-away`` while it
    can't order messages. If other workers can't be started the answer says how many, for how long, and why."""
    if context.hub.draining:
        raise Refusal("draining", "This server is stopping; use another one.")
    if not context.hub.ready():
        raise Refusal("backplane-away", "What orders the messages of this service is out of reach; use another server, or wait.")
    missing = context.missing()
    return answer({"status": "ready", "missing": missing} if missing["workers"] else {"status": "ready"})


def stats(context: Context) -> HTTPResponse:
    """GET /stats: the counters of the whole service (`comet.service`)."""
    return answer(context.service())
