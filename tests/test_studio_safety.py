"""Who may ask the studio for what, and in which order people are served."""

import asyncio
import os
import stat
import threading
import time

import httpx
import pytest

from samplers.studio import safety, serve
from samplers.studio.line import Line, Stopped

# ---- people in line


def test_people_come_in_their_order_and_hear_how_many_are_before_them():
    line, gate, order = Line(), threading.Event(), []
    first = line.join("a", lambda ticket: gate.wait(20))
    later = [line.join(name, lambda ticket, name=name: order.append(name) or name) for name in "bcd"]
    follow = line.follow(later[2], 0.02)
    assert next(follow) == ("waiting", 3)
    gate.set()
    assert list(line.follow(first))[-1] == ("done", True)
    assert list(follow)[-1] == ("done", "d") and order == ["b", "c", "d"]
    line.close()


def test_who_waits_stops_at_once_and_who_computes_at_his_next_step():
    line, begun, gate = Line(), threading.Event(), threading.Event()

    def work(ticket):
        begun.set()
        gate.wait(20)
        ticket.check()
        return "not stopped"

    running, waiting = line.join("a", work), line.join("b", work)
    other = line.join("c", lambda ticket: "c")
    begun.wait(20)
    line.stop("b")
    with pytest.raises(Stopped):
        list(line.follow(waiting))
    line.stop("a")
    gate.set()
    with pytest.raises(Stopped):
        list(line.follow(running))
    assert list(line.follow(other))[-1] == ("done", "c")
    line.close()


def test_an_error_goes_to_who_asked_and_the_line_goes_on():
    line = Line()

    def fail(ticket):
        raise FloatingPointError("latents: NaN")

    with pytest.raises(FloatingPointError, match="NaN"):
        list(line.follow(line.join("a", fail)))
    heard = list(line.follow(line.join("a", lambda ticket: ticket.tell("half") or "whole")))
    assert heard == [("progress", "half"), ("done", "whole")]
    line.close()


def test_a_line_has_an_end():
    line, gate = Line(most=2), threading.Event()
    begun = threading.Event()
    line.join("a", lambda ticket: begun.set() or gate.wait(20))
    begun.wait(20)
    waiting = [line.join("b", lambda ticket: None) for _ in range(2)]
    with pytest.raises(ValueError, match="2 clips are waiting already"):
        line.join("c", lambda ticket: None)
    gate.set()
    line.close()
    with pytest.raises(ValueError, match="closing"):
        line.join("c", lambda ticket: None)
    assert all(ticket.said.qsize() == 1 for ticket in waiting)  # each heard how it ended


# ---- who may ask


HERE, ELSEWHERE = ("127.0.0.1", "127.9.9.9", "localhost"), ("0.0.0.0", "192.168.1.5", "studio.example")


@pytest.mark.parametrize("host, local", [*((one, True) for one in HERE), *((one, False) for one in ELSEWHERE)])
def test_a_token_where_others_can_reach_the_page(host, local):
    assert safety.is_local(host) == local and (safety.token_of(host, None) is None) == local
    assert safety.token_of(host, "0123456789abcdef") == "0123456789abcdef"
    if not local:
        assert len(safety.token_of(host, None)) >= 32 and safety.token_of(host, None) != safety.token_of(host, None)


async def _inner(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"page"})


def ask(bound, token, path="/", method="GET", **headers):
    """The answer of a guarded application; header names with underscores."""
    app = safety.guarded(_inner, bound, token)

    async def get():
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:7860") as client:
            return await client.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})

    return asyncio.run(get())


@pytest.mark.parametrize("name, status", [("127.0.0.1:7860", 200), ("localhost:1", 200), ("evil.example", 400),
                                          ("127.0.0.1.evil.example", 400), ("192.168.1.5", 400)])  # fmt: skip
def test_names_that_point_here_from_elsewhere_are_refused(name, status):
    assert ask("127.0.0.1", None, host=name).status_code == status


@pytest.mark.parametrize(
    "headers, status",
    [({}, 200), ({"origin": "http://127.0.0.1:7860"}, 200), ({"origin": "http://evil.example"}, 403),
     ({"origin": "http://127.0.0.1:9999"}, 403), ({"origin": "null"}, 403)],
)  # fmt: skip
def test_pages_from_elsewhere_may_ask_nothing(headers, status):
    assert ask("127.0.0.1", None, "/gradio_api/upload", "POST", **headers).status_code == status


@pytest.mark.parametrize("path", ["/gradio_api/file=http://example.org/x", "/gradio_api/file=https://example.org/x",
                                  "/gradio_api/proxy=https://a.hf.space/x"])  # fmt: skip
def test_the_server_fetches_nothing(path):
    assert ask("127.0.0.1", None, path).status_code == 403


def test_the_token_opens_the_page_and_then_the_cookie_does():
    token = "0123456789abcdef-_"
    for path in ("/", "/gradio_api/config", "/clips/x/clip.mp4", "/?token=wrong", "/?token=", "/config?token=" + token):
        answer = ask("0.0.0.0", token, path)
        assert answer.status_code == 401 and "token" in answer.text and "page" not in answer.text
    opened = ask("0.0.0.0", token, f"/?token={token}")
    assert opened.status_code == 303 and opened.headers["location"] == "/"
    cookie = opened.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
    assert ask("0.0.0.0", token, "/config", cookie=cookie.split(";")[0]).text == "page"
    assert ask("0.0.0.0", token, "/config", cookie=f"{safety.COOKIE}=wrong").status_code == 401


def test_answers_forbid_the_browser_to_ask_elsewhere():
    headers = ask("127.0.0.1", None).headers
    assert "default-src 'self'" in headers["content-security-policy"] and headers["referrer-policy"] == "no-referrer"


def test_only_uploads_are_read(tmp_path):
    (tmp_path / "uploads").mkdir()
    (tmp_path / "uploads" / "a.png").write_bytes(b"a")
    (tmp_path / "other.png").write_bytes(b"b")
    (tmp_path / "uploads" / "link.png").symlink_to(tmp_path / "other.png")
    folder = tmp_path / "uploads"
    assert safety.uploaded(None, folder) is None
    assert safety.uploaded({"path": str(folder / "a.png")}, folder) == folder / "a.png"
    inside = [str(folder / one) for one in ("", "none", "link.png", "../other.png")]
    for wrong in ("/etc/passwd", "http://example.org/a.png", "a\0b", *inside):
        with pytest.raises(ValueError, match="upload"):
            safety.uploaded({"path": wrong}, folder)
    for wrong in ({}, {"url": "data:image/png;base64,AAAA"}, 3, ["a"]):
        with pytest.raises(ValueError, match="upload"):
            safety.uploaded(wrong, folder)


def test_old_uploads_go_and_the_page_stays(tmp_path):
    now = time.time()
    ages = {"page.png": 9000, "old.png": 8000, "new.png": 10}
    for name, age in ages.items():
        path = tmp_path / name.split(".")[0] / name
        path.parent.mkdir()
        path.write_bytes(b"a")
        os.utime(path, (now - age, now - age))
    safety.tidy(tmp_path, since=now - 8500)
    assert {path.name for path in tmp_path.rglob("*.png")} == {"page.png", "new.png"}


def test_the_folder_of_a_run_is_its_own_and_goes():
    with safety.own_folder() as folder:
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
        (folder / "a").mkdir()
        (folder / "a" / "b").write_text("c")
    assert not folder.exists()
    with pytest.raises(KeyboardInterrupt), safety.own_folder() as folder:
        raise KeyboardInterrupt
    assert not folder.exists()


@pytest.mark.parametrize("clip, good", [("0" * 32, True), ("..", False), ("0" * 31 + "/", False), ("g" * 32, False)])
@pytest.mark.parametrize(
    "name, fine",
    [(one, True) for one in ("clip.mp4", "clip.sheet.png", "key12.png")]
    + [(one, False) for one in ("clip.json", "../clip.mp4", "a.mp4", "clip.mp4\n")],
)
def test_only_clips_are_served(clip, good, name, fine):
    assert bool(serve.CLIP.fullmatch(clip) and serve.FILE.fullmatch(name)) == (good and fine)
