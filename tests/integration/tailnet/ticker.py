"""A TCP end for forwardings. `listen`: prints its port, says a byte ten times a second to each, prints "open" and "closed". `connect HOST PORT`: "open" with the first byte, "closed" at the end."""
import selectors
import socket
import sys
import time


def say(*words):
    print(*words, flush=True)


def listen():
    listener = socket.create_server(("127.0.0.1", 0))
    say(listener.getsockname()[1])
    watch = selectors.DefaultSelector()
    watch.register(listener, selectors.EVENT_READ)
    told = set()
    while True:
        for key, _ in watch.select(0.1):
            if key.fileobj is listener:
                s, _ = listener.accept()
                watch.register(s, selectors.EVENT_READ)
                told.add(s)
                say("open")
                continue
            try:
                gone = not key.fileobj.recv(1 << 16)
            except OSError:
                gone = True
            if gone:
                end(watch, told, key.fileobj)
        for s in list(told):
            try:
                s.send(b".")
            except OSError:
                end(watch, told, s)


def end(watch, told, s):
    watch.unregister(s)
    told.discard(s)
    s.close()
    say("closed")


def connect(host, port):
    limit = time.monotonic() + 10
    while True:
        try:
            s = socket.create_connection((host, int(port)))
            first = s.recv(1)  # a forwarder whose other end is not there yet hangs up
            if first:
                break
        except OSError:
            pass
        if time.monotonic() > limit:
            say("no connection")
            return
        time.sleep(0.05)
    say("open")
    try:
        while s.recv(1 << 16):
            pass
    except OSError:
        pass
    say("closed")


if sys.argv[1] == "listen":
    listen()
else:
    connect(*sys.argv[2:])
