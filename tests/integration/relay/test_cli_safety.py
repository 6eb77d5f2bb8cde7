"""What a recorder or a recording says never reaches the terminal of whoever lists, or asks for, recordings as anything but text."""
import http.server
import json
import subprocess
import threading

import pytest

import harness

HOSTILE = "\x1b]0;owned\x07\x9b31m\u202e"


@pytest.fixture
def hostile_recorder():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            one = self.path != "/postern/v1/recordings"
            line = json.dumps({"id": "a" * 26, "state": "live" + HOSTILE, "length": 1, "path": HOSTILE, "created_ms": 2**60,
                               "header": {"srcNodeUser": HOSTILE, "command": HOSTILE, "localUser": HOSTILE}}, ensure_ascii=False)
            body = (HOSTILE if one else line + "\n").encode()
            self.send_response(403 if one else 200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("arguments", [["recordings", "ls", "--recorder", "{}"], ["recordings", "ls", "--json", "--recorder", "{}"],
                                       ["play", "http://{}/postern/v1/recordings/x"]], ids=["ls", "json", "play"])
def test_nothing_that_a_recorder_says_steers_the_terminal(hostile_recorder, arguments):
    done = subprocess.run([str(harness.BIN / "postern"), *(a.format(hostile_recorder) for a in arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=20)
    said = done.stdout + done.stderr
    assert b"owned" in said
    assert all(byte == 10 or 0x20 <= byte < 0x7f for byte in said), said
