"""TwiFF-Bench's judge against a real HTTP server."""

import copy
import functools
import http.server
import json
import os
import re
import threading
import time

import pytest
from scripted import SPAN, play, png, settings

import evaluate
from common import judge, runs
from common.formats import Frame, Row
from common.judge import Judge, ScoreJudge, read_scores, score_messages
from model import LATENT, LATENT_END, LATENT_START


@pytest.mark.parametrize(
    "reply, chain, answer",
    [
        ('{"chain": 4, "answer": 5}', 4, 5),
        ('```json\n{"chain": 3.5, "answer": 2}\n```', 3.5, 2),
        ('{"chain": "4", "answer": "3/5"}', 4, 3),
        ('{"chain": [[2]], "answer": [1]}', 2, 1),
        ("[[4, 5]]", 4, 5),
        ("[1, 0]", 1, 0),
        ('{"chain": 9, "answer": -3}', 5, 0),
        ('{"answer_score": 2, "Chain quality": 1}', 1, 2),
        ('<think>{"chain": 0, "answer": 0}</think> Fine: {"chain": 1, "answer": 2}', 1, 2),
        ('[{"chain": {"score": 3}, "answer": 4}]', 3, 4),
        ('{"scores": {"chain": 3, "answer": 4}}', 3, 4),
        ('{"chain": 4, {"chain": 2, "answer": 2}', 2, 2),
        ('{"chain": 1e400, "answer": 1}', None, None),
        ('{"chain": NaN, "answer": 1}', None, None),
        ('{"chain": true, "answer": 1}', None, None),
        ('{"chain": 4}', None, None),
        ('{"chain": [1, 2], "answer": 3}', None, None),
        ('{"chain": 4, "answer": 3}, see frames [1, 2]', 4, 3),
        ("four and five", None, None),
        ("", None, None),
        (None, None, None),
        ("[" * 3000, None, None),
        ('{"chain": "4 or 5", "answer": 1}', None, None),
    ],
)
def test_read_scores(reply, chain, answer):
    """Breaks if a shape judges reply in is lost, an ambiguous one is guessed, or a score leaves
    0..5.
    """
    assert read_scores(reply) == (None if chain is None else dict(chain=chain, answer=answer))


@pytest.fixture
def server():
    """A chat server on this machine: replies[word in the request] is a text, a status, or a wait in
    seconds.
    """
    state = dict(replies={}, requests=[], headers={})

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            state["requests"].append(json.loads(body))
            reply = next(r for word, r in state["replies"].items() if word in body)
            if isinstance(reply, list):  # one after another, the last one stays
                reply = reply.pop(0) if len(reply) > 1 else reply[0]
            if isinstance(reply, float):
                time.sleep(reply)
            status = reply if isinstance(reply, int) else 200
            message = dict(
                index=0, finish_reason="stop", message=dict(role="assistant", content=str(reply))
            )
            data = json.dumps(
                dict(id="1", object="chat.completion", created=0, model="m", choices=[message])
            ).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                for name, value in state["headers"].items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
            except (BrokenPipeError, ConnectionResetError):  # the client gave up waiting
                pass

        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield dict(state, url=f"http://127.0.0.1:{httpd.server_port}/v1")
    httpd.shutdown()
    httpd.server_close()


def test_a_failed_request_is_the_clients_to_repeat(server, monkeypatch):
    """Breaks if our loop multiplies the client's retries, or Retry-After is not heeded."""
    waits = []
    monkeypatch.setattr("common.judge.time.sleep", waits.append)
    server["replies"].update(q=503)
    asker = Judge(server["url"], "m", retries=2, timeout=5.0)
    assert asker([("q", "g", "a")]) == [None] and len(server["requests"]) == 3
    assert asker.client.max_retries == 2 and asker.failures == {"InternalServerError 503": 1}
    server["replies"].update(q=[429, "yes"])
    server["headers"]["Retry-After"] = "7"
    assert asker([("q", "g", "a")]) == [True] and waits[-1] == 7


def test_arguments_of_the_request(server, tmp_path):
    """Breaks if a judge that takes no temperature cannot be asked, or is answered from another's
    cache.
    """
    server["replies"].update(truth='{"chain": 1, "answer": 2}')
    row = Row("f:0", "0", ["what ?"], [], "truth", "what ?")
    cases = (None, dict(temperature=1, seed=3), dict(temperature=None))
    for args in cases:
        asker = ScoreJudge(server["url"], "m", cache=str(tmp_path / "cache.jsonl"), args=args)
        assert asker([(row, "x")]) == [(dict(chain=1, answer=2), None)]
    asked = [{k: r[k] for k in r if k not in ("model", "messages")} for r in server["requests"]]
    assert asked == [dict(temperature=0), dict(temperature=1, seed=3), {}]


def twiff(folder):
    """Seven rows of TwiFF-Bench, as paths of PNG files; q5's question picture is missing."""
    for i in range(2):
        (folder / f"{i}.png").write_bytes(png(i))
    records = [
        dict(
            video="v.mp4",
            question=f"<image> what next ? q{i}",
            question_images_index=[3],
            reasoning_images_index=[5],
            question_images=["gone.png" if i == 5 else "0.png"],
            reasoning_images=["1.png"],
            answer=f"THOUGHT 1: ref{i} <rimage> so <ans>truth{i}</ans>",
            meta_data={"class": "sport" if i < 3 else "home"},
        )
        for i in range(7)
    ]
    (folder / "twiff.jsonl").write_text("\n".join(map(json.dumps, records)))
    return str(folder / "twiff.jsonl")


# by the word in a reference: a verdict, a score to clamp, an error, a stall, and mumbling first
REPLIES = dict(
    truth0='{"chain": 4, "answer": 5}',
    truth1='{"chain": 3.5, "answer": "2"}',
    truth2=500,
    truth3="[[9, -1]]",
    truth4=2.5,
    truth6=["well", 'x ```{"chain": [2], "answer": 1}```'],
)


@pytest.fixture
def answered(scripted, tmp_path, monkeypatch, server):
    """A run on the seven rows, answered and not judged yet: (its config, the judge's)."""
    folder, tokenizer = scripted
    answer = f"<reason> one </reason> {SPAN} <answer> two q{{}} </answer>"
    play(monkeypatch, tokenizer, {f"q{i}": answer.format(i) for i in range(7)})
    config = settings(folder, tmp_path, benchmark="twiffbench", data=twiff(folder))
    ask = judge.Config(model="m", url=server["url"], retries=1, timeout=1.0)
    monkeypatch.setattr(judge, "ScoreJudge", functools.partial(ScoreJudge, backoff=0.01))
    monkeypatch.setenv("JUDGE_API_KEY", "secret-key")
    evaluate.evaluate(config)
    return config, ask


def test_responses_wait_for_a_judge(answered, tmp_path, server, capsys):
    """Breaks if an unjudged row counts as wrong, nobody says what to do, or a wrong command is not
    refused by name.
    """
    config, ask = answered
    scores = evaluate.evaluate(config)["all"]
    out = capsys.readouterr().out
    assert f"6 responses wait for a judge: python -m common.judge {tmp_path} --model NAME" in out
    assert [scores[k] for k in ("waiting", "n", "skipped", "unparsed")] == [6, 0, 1, 0]
    with pytest.raises(SystemExit, match="--model is missing"):
        judge.score_run(str(tmp_path), judge.Config())
    with pytest.raises(SystemExit, match="settings.json: no such file"):
        judge.score_run(str(tmp_path / "x"), ask)
    written = json.loads((tmp_path / "settings.json").read_text())
    (tmp_path / "settings.json").write_text(json.dumps(dict(written, benchmark="mcq")))
    with pytest.raises(SystemExit, match="only --benchmark twiffbench is judged"):
        judge.score_run(str(tmp_path), ask)
    assert not server["requests"]


def test_twiffbench_judged_later(answered, tmp_path, server, capsys):
    """Breaks if a failing, stalling or mumbling judge loses a row or scores it.

    By hand: sport (4, 5), (3.5, 2), fails; home: (5, 0) clamped, stalls, gone, (2, 1) at the second
    attempt. chain: (4 + 3.5 + 5 + 2) / 4, answer: (5 + 2 + 0 + 1) / 4.
    """
    config, ask = answered
    server["replies"].update(copy.deepcopy(REPLIES))
    judge.score_run(str(tmp_path), ask)
    table = evaluate.evaluate(config)
    names = ("n", "chain", "answer", "average", "failed", "skipped", "waiting")
    assert {group: tuple(s[k] for k in names) for group, s in table.items()} == {
        "home": (2, 3.5, 0.5, 2.0, 1, 1, 0),
        "sport": (2, 3.75, 3.5, 3.625, 1, 0, 0),
        "all": (4, 14.5 / 4, 2.0, 22.5 / 8, 2, 1, 0),
    }

    # three are asked once; the failing, the stalling and the mumbling twice
    asked = server["requests"]
    assert len(asked) == 3 + 2 + 2 + 2
    kinds = [part["type"] for part in asked[0]["messages"][1]["content"]]
    assert kinds.count("image_url") == 2 and "truth5" not in json.dumps(asked)

    # the failures are named
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["judge_failures"] == 2 and summary["found"] == 6 and summary["total"] == 7
    judged = {j["id"][-1]: j for j in runs.read_lines(str(tmp_path / "judged.jsonl"))}
    assert len(judged) == 6 and judged["2"]["why"] == "InternalServerError 500"
    assert judged["4"]["why"] == "APITimeoutError"
    out = capsys.readouterr().out
    assert "judge: 1 x APITimeoutError" in out
    assert re.search(r"ours, 6 of 7 found +3.62 +2.00 +2.81\n", out)


def test_a_second_judging_asks_what_failed(answered, tmp_path, server):
    """Breaks if a verdict is asked for again, is given to another response, or the key is kept."""
    config, ask = answered
    server["replies"].update(REPLIES, truth4=500, truth6='{"chain": 2, "answer": 1}')
    judge.score_run(str(tmp_path), ask)
    server["requests"].clear()
    server["replies"].update(truth2='{"chain": 1, "answer": 1}', truth4='{"chain": 1, "answer": 1}')
    judge.score_run(str(tmp_path), ask)
    assert len(server["requests"]) == 2
    scores = evaluate.evaluate(config)["all"]
    assert scores["n"] == 6 and scores["failed"] == 0
    for file in os.listdir(tmp_path):
        assert b"secret-key" not in (tmp_path / file).read_bytes()

    # what was said of another response does not count
    judged = runs.read_lines(str(tmp_path / "judged.jsonl"))
    lines = [dict(id=j["id"], response="another response") for j in judged]
    judge.add_verdicts(str(tmp_path), lines)
    assert not any("judged" in line or "why" in line for line in lines)


def test_the_judge_sees_what_it_should(tmp_path):
    """Breaks if the judge misses a part, sees a future as a shown frame, or a text-only judge is
    sent pictures.
    """
    prompt, future = [Frame(png(0)), "what next ?"], ["one", Frame(png(1)), "two"]
    row = Row("f:0", "0", prompt, future, "true", "what next ?")
    span = f"{LATENT_START}{LATENT}{LATENT_END}"
    response = f"<reason>guess</reason>{span}<reason>so</reason><answer>mine</answer><|im_end|>"
    _, user = score_messages(row, response, images=False)
    order = ["## Question", "[a frame]", "what next ?"]
    order += ["## Reference chain", "one", "[a frame]", "two", "## True answer", "true"]
    order += ["## Candidate's chain", "guess", "[imagines]", "so", "## Candidate's answer", "mine"]
    at = -1
    for part in order:
        at = user["content"].index(part, at + 1)
    assert "<" not in user["content"]
    _, user = score_messages(row, "no answer here")
    assert [p["type"] for p in user["content"]].count("image_url") == 2
    assert user["content"][-1]["text"] == "(none given)"
