from __future__ import annotations

import json
import threading

import pytest
import structlog
import zmq

from daemon.keys import Security
from daemon.serving import Answer, Serving
from daemon.sockets import EndpointError

_BODY = b"x" * 1000


class Held:
    """A daemon that holds very many verdicts."""

    def __init__(self):
        self.read = 0

    def carry_out(self, command):
        return Answer({"pong": True})

    def last_published(self):
        return 10_000_000

    def verdicts(self, first, last):
        self.read += last - first + 1
        return ((n, _BODY) for n in range(first, last + 1))


@pytest.fixture
def served(tmp_path):
    held, context = Held(), zmq.Context()
    endpoint = f"ipc://{tmp_path / 'replay.sock'}"
    serving = Serving(
        [], [endpoint], context=context, security=Security(None), controls=held, log=structlog.ReturnLogger()
    )
    thread = threading.Thread(target=serving.run)
    thread.start()
    serving.ready.result(30)
    clients = []

    def connect():
        clients.append(context.socket(zmq.DEALER))
        clients[-1].setsockopt(zmq.RCVHWM, 1)
        clients[-1].setsockopt(zmq.RCVTIMEO, 30_000)
        clients[-1].connect(endpoint)
        return clients[-1]

    yield held, connect
    serving.end()
    thread.join(30)
    for client in clients:
        client.close(0)
    context.term()
    assert not thread.is_alive()


def ask(client, request_id, **wanted):
    client.send(json.dumps({"id": request_id, "replay": wanted}).encode())


def answer_to(client, request_id):
    """Return what comes before the answer to a request, and its first piece's head."""
    others = []
    while True:
        head, *bodies = client.recv_multipart()
        reply = json.loads(head)
        assert len(bodies) == reply.get("verdicts", 0)
        if reply["id"] == request_id:
            return others, reply
        others.append(reply)


def test_a_client_that_does_not_read_its_replay_costs_a_few_pieces_of_memory(served):
    held, connect = served
    ask(connect(), "greedy", **{"from": 1})
    modest = connect()
    for n in range(200):  # each takes a turn at least, in which the other could be given a piece
        ask(modest, str(n), **{"from": 1, "to": 1})
        assert answer_to(modest, str(n)) == ([], one_verdict(str(n)))
    assert held.read - 200 < 40 * 256


def one_verdict(request_id):
    return {"id": request_id, "ok": True, "verdicts": 1, "missing": [], "more": False, "next": 2}


def test_who_asks_again_is_not_sent_what_he_asked_before(served):
    _, connect = served
    client = connect()
    for n in range(20):
        ask(client, f"old {n}", **{"from": 1})
    ask(client, "new", **{"from": 1, "to": 600})
    before, head = answer_to(client, "new")
    assert all(reply["ok"] for reply in before), "not one was too many"
    assert head["more"]
    for more in (True, False):
        others, head = answer_to(client, "new")
        assert (others, head["more"]) == ([], more)
    ask(client, "last", **{"from": 1, "to": 1})
    assert answer_to(client, "last") == ([], one_verdict("last"))


def test_a_local_socket_that_another_station_serves_is_left_to_it(served, tmp_path):
    _, connect = served
    context = zmq.Context()
    endpoint = f"ipc://{tmp_path / 'replay.sock'}"
    second = Serving(
        [], [endpoint], context=context, security=Security(None), controls=Held(), log=structlog.ReturnLogger()
    )
    with pytest.raises(EndpointError, match=r"replay\.sock: .*another station or program has it"):
        second.run()
    context.term()
    client = connect()
    ask(client, "still", **{"from": 1, "to": 1})
    assert answer_to(client, "still") == ([], one_verdict("still"))
