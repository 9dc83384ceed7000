"""A web server for one person on this machine: one page, JSON in and out, and nothing else.

It answers this machine alone unless --host says otherwise, and whoever knows the token of the address that it
prints. Beside that it looks at what a page of somebody else's could make a browser send: the Host header (DNS
rebinding), the Origin header and the kind of content (cross-site requests). No request names a file, so none
can leave a folder. Texts reach the page as JSON, and the page shows them as text; its policy lets no other
script run.
"""
import hmac
import json
import os
import re
import secrets
import socket
import sys
import threading
import webbrowser
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from plumbing.flags import UserError, require

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
COOKIE = "barerlhf"
BODY_LIMIT = 1 << 20  # bytes of a request
SILENCE_LIMIT = 30  # seconds that a connection may say nothing


class Refused(Exception):
    """A request that is not done: an HTTP status, and why."""

    def __init__(self, status, why):
        super().__init__(why)
        self.status, self.why = status, why


class Server(ThreadingHTTPServer):
    """A page and what it may ask for.

    page: HTML, in which every NONCE becomes this server's; routes: {path: f}, f(body) -> JSON value, or an
    iterator of them, which are sent one a line as they come. body is the request's object. One f runs at a
    time. token: what the address shows that whoever opens it was told of it, see `token_of`. Raises UserError
    if the address can't be had.
    """
    daemon_threads = True

    def __init__(self, host, port, page, routes, token):
        self.routes, self.token = routes, token
        self.busy = threading.Lock()
        self.nonce = secrets.token_urlsafe(16)
        self.page = page.replace("NONCE", self.nonce).encode()
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            raise UserError(f"--host {host} --port {port}: the page can't be opened there ({error}); name "
                            "another --port, or 0 for any that is free") from None
        self.names = {*LOOPBACK, host}
        self.names = {f"{name}:{self.server_port}" for name in self.names}

    @property
    def address(self):
        """What to open in a browser."""
        return f"http://{self.server_address[0]}:{self.server_port}/?token={self.token}"

    def handle_error(self, request, client_address):
        """Connections that break are no news."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection."""
    protocol_version = "HTTP/1.1"
    timeout = SILENCE_LIMIT
    server_version, sys_version = "barerlhf", ""

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.answer(self.get)

    def do_POST(self):
        self.answer(self.post)

    def answer(self, how):
        """Do a request, or say why not."""
        try:
            self.check_headers()
            how()
        except Refused as refused:
            # Its body may be unread, so the connection can't go on.
            self.close_connection = True
            self.send(refused.status, json.dumps({"error": refused.why}).encode())
        except UserError as error:
            self.send(400, json.dumps({"error": str(error)}).encode())
        except OSError as error:
            # The browser is gone, or a disk is full: then the page is told.
            self.close_connection = True
            if not isinstance(error, (ConnectionError, socket.timeout)):
                self.send(507, json.dumps({"error": f"NOT SAVED: {error.strerror}"}).encode())

    def check_headers(self):
        """Refused if the request was not made for this page."""
        if self.headers.get("Host") not in self.server.names:
            raise Refused(403, "this page is not for that host")
        origin = self.headers.get("Origin")
        if origin is not None and origin not in {f"http://{name}" for name in self.server.names}:
            raise Refused(403, "this page is not for other pages")

    def known(self):
        """Whether the browser has shown the token before."""
        try:
            cookie = SimpleCookie(self.headers.get("Cookie", "")).get(self.cookie_name)
        except CookieError:
            return False
        return cookie is not None and self.is_token(cookie.value)

    @property
    def cookie_name(self):
        """Cookies are shared by all ports of a host, so the port is in the name."""
        return f"{COOKIE}_{self.server.server_port}"

    def is_token(self, text):
        return hmac.compare_digest(text.encode(), self.server.token.encode())

    def get(self):
        url = urlsplit(self.path)
        if url.path != "/":
            raise Refused(404, "there is no such page")
        given = parse_qs(url.query).get("token", [""])[0]
        if self.is_token(given):
            cookie = f"{self.cookie_name}={self.server.token}; HttpOnly; SameSite=Strict; Path=/"
            self.send(303, b"", **{"Location": "/", "Set-Cookie": cookie})
        elif self.known():
            self.send(200, self.server.page, "text/html; charset=utf-8")
        else:
            raise Refused(403, "open the address that the terminal shows, with its token")

    def post(self):
        if not self.known():
            raise Refused(403, "open the address that the terminal shows, with its token")
        route = self.server.routes.get(self.path)
        if route is None:
            raise Refused(404, "there is no such request")
        body = self.body()
        with self.server.busy:
            answer = route(body)
            if hasattr(answer, "__next__"):
                self.stream(answer)
                return
        self.send(200, json.dumps(answer).encode())

    def body(self):
        """The object of a request."""
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "a request is application/json")
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            raise Refused(411, "a request says how long it is")
        if int(length) > BODY_LIMIT:
            raise Refused(413, f"a request has at most {BODY_LIMIT:,} bytes")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise Refused(400, "the request is not JSON") from None
        if not isinstance(body, dict):
            raise Refused(400, "the request is not an object")
        return body

    def head(self, status, kind, headers):
        """Send the status and headers."""
        self.send_response(status)
        policy = (f"default-src 'none'; script-src 'nonce-{self.server.nonce}'; "
                  f"style-src 'nonce-{self.server.nonce}'; connect-src 'self'; base-uri 'none'; "
                  "form-action 'none'; frame-ancestors 'none'")
        headers = {
            "Content-Type": kind,
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        } | headers
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def send(self, status, data, kind="application/json", **headers):
        """Send a whole answer."""
        self.head(status, kind, {"Content-Length": str(len(data))} | headers)
        self.wfile.write(data)

    def stream(self, values):
        """Send values one a line; the connection's end is theirs."""
        self.close_connection = True
        try:
            self.head(200, "application/x-ndjson", {"Connection": "close"})
            for value in values:
                self.wfile.write(json.dumps(value).encode() + b"\n")
                self.wfile.flush()
        finally:
            # Before others may go on, also where nobody reads to the end.
            values.close()


def serve(server, browser, say=print):
    """Serve until Ctrl-C. browser: open the page in one."""
    host = server.server_address[0]
    try:
        if host not in LOOPBACK:
            say(f"warning: --host {host} lets other machines in; whoever has this address can read and write")
        say(f"{server.address}\nCtrl-C ends")
        if browser:
            threading.Thread(target=webbrowser.open, args=[server.address], daemon=True).start()
        server.serve_forever(poll_interval=0.1)
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


def token_of(folder):
    """A folder's token, made if it has none: so an open page goes on when the server is started again."""
    path = folder / ".token"
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        with open(descriptor, "r+") as file:
            token = file.read()
            if not re.fullmatch(r"[\w-]{32}", token):
                token = secrets.token_urlsafe(24)
                file.seek(0)
                file.write(token)
                file.truncate()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be written: {error}") from None
    return token


def page_of(path):
    """The text of a page, in which COLOURS is the file colours.css beside it."""
    colours = path.with_name("colours.css")
    for file in (path, colours):
        require(file.is_file(), f"{file} is missing; clone the repository again")
    return path.read_text("utf-8").replace("COLOURS", colours.read_text("utf-8"))
