"""Bugs planted in plumbing/web.py, and the tests that ought to notice them."""

ATTACKS = "test_label.py::test_attacks_are_refused_and_leave_the_votes_alone"
ADDRESS = "test_label.py::test_the_address_with_its_token_gives_a_cookie_and_then_the_page"

MUTANTS = [
    ("web: any host", ATTACKS,
     "if self.headers.get(\"Host\") not in self.server.names:", "if self.headers.get(\"Host\") is None:"),
    ("web: any origin", ATTACKS,
     "        if origin is not None and origin not in", "        if origin == \"\" and origin not in"),
    ("web: requests need no token", ATTACKS,
     "    def post(self):\n        if not self.known():", "    def post(self):\n        if False:"),
    ("web: the page needs no token", ATTACKS,
     "        elif self.known():\n", "        elif True:\n"),
    ("web: any kind of content", ATTACKS,
     "        if self.headers.get_content_type() != \"application/json\":", "        if False:"),
    ("web: bodies of any size", ATTACKS,
     "        if int(length) > BODY_LIMIT:", "        if False:"),
    ("web: a list is an object", ATTACKS,
     "        if not isinstance(body, dict):", "        if False:"),
    ("web: any path is the page", ATTACKS,
     "        if url.path != \"/\":", "        if False:"),
    ("web: scripts may read the token", ADDRESS,
     "HttpOnly; SameSite=Strict; Path=/", "SameSite=Strict; Path=/"),
    ("web: the page may be framed", ADDRESS,
     "\"form-action 'none'; frame-ancestors 'none'\")", "\"form-action 'none'\")"),
    ("web: others may read the token",
     "test_label.py::test_a_port_that_is_taken_is_one_line_and_another_hosts_page_is_warned_of",
     "0o600", "0o644"),
    ("web: a full disk is nothing to speak of",
     "test_label.py::test_what_the_desk_refuses_and_a_full_disk_are_said_to_the_page",
     "                self.send(507,", "                self.send(200,"),
]
