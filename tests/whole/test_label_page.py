"""The page of label.py in a real browser: clicks, keys, kills, and text that would like to be more than text.

It takes Chromium with its driver (Debian: apt install chromium chromium-driver) and selenium.
"""
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time

import pytest

from label import Votes
from tools import ENVIRONMENT, ROOT, write_rows

DRIVER = shutil.which("chromedriver")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.common.exceptions import WebDriverException  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

pytestmark = [
    pytest.mark.long,
    pytest.mark.case(32),
    pytest.mark.skipif(not (DRIVER and CHROMIUM), reason="Chromium and its driver are not installed"),
]


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 "--window-size=1200,900"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


class Labelling:
    """label.py on a port that stays the same when it is started again."""

    def __init__(self, folder, *words):
        self.folder, self.words = folder, words
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process = None

    def start(self):
        command = [sys.executable, "-u", ROOT / "label.py", "--out", self.folder, *self.words, "--no-browser",
                   "--port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                        env=ENVIRONMENT, start_new_session=True)
        said = []
        for line in self.process.stdout:
            said.append(line)
            if line.startswith("http"):
                return line.strip()
        raise AssertionError("".join(said))

    def kill(self, number=signal.SIGKILL):
        os.killpg(self.process.pid, number)
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def labelling(tmp_path, browser):
    """labelling(rows, words) -> the `Labelling` whose page the browser shows."""
    made = []

    def begin(rows, *words):
        write_rows(tmp_path / "rows.jsonl", rows)
        one = Labelling(tmp_path / "labels", "--data", tmp_path / "rows.jsonl", *words)
        made.append(one)
        browser.get(one.start())
        wait(browser, lambda: text_of(browser, "count"))
        return one

    yield begin
    for one in made:
        one.kill()


def wait(browser, condition, seconds=20):
    end = time.monotonic() + seconds
    while True:
        try:
            found = condition()
        except WebDriverException:
            found = None
        if found:
            return found
        assert time.monotonic() < end, browser.find_element(By.TAG_NAME, "body").text
        time.sleep(0.01)


def text_of(browser, name):
    return browser.find_element(By.ID, name).text


def done_of(browser):
    return int(text_of(browser, "count").split()[0])


def press(browser, keys):
    browser.switch_to.active_element.send_keys(keys)


def click(browser, words):
    """Click on the button whose text begins with some words."""
    for one in browser.find_elements(By.TAG_NAME, "button"):
        if one.is_displayed() and one.text.startswith(words):
            one.click()
            return
    raise AssertionError(words)


def complaints(browser):
    """What the console of the page says, but for requests that found no server."""
    return [line["message"] for line in browser.get_log("browser") if "ERR_" not in line["message"]]


PAIRS = [{"prompt": f"question {i}", "completions": [f"yes {i}", f"no, and more {i}"]} for i in range(1000)]


def test_of_a_thousand_votes_and_twenty_kills_none_is_lost_and_none_doubled(browser, labelling, tmp_path):
    one = labelling(PAIRS, "--repeats", "0")
    rng = random.Random(0)
    kills = sorted(rng.sample(range(5, 995), 20))
    given = []
    while len(given) < 1000:
        before = done_of(browser)
        shown = text_of(browser, "prompt").removeprefix("user\n")
        if kills and len(given) >= kills[0]:
            # A vote meets a server that was just killed: it is sent again until it is saved.
            kills.pop(0)
            one.kill()
        value = rng.randint(1, 7)
        if rng.random() < 0.5:
            press(browser, str(value))
        else:
            browser.find_elements(By.CSS_SELECTOR, "#scale button")[value - 1].click()
        if one.process.poll() is not None:
            wait(browser, lambda: "NOT SAVED" in text_of(browser, "saved"))
            one.start()
        wait(browser, lambda: done_of(browser) == before + 1, 60)
        given.append((shown, value))
    assert text_of(browser, "saved") == "saved" and "1000 of 1000" in text_of(browser, "count")
    lines = (tmp_path / "labels" / "items.jsonl").read_text().splitlines()
    prompts = {item["id"]: item["prompt"][0]["content"] for item in map(json.loads, lines)}
    votes = Votes(tmp_path / "labels", "me")
    assert [(prompts[vote["item"]], vote["value"]) for vote in votes.records] == given
    times = browser.execute_script("return performance.getEntriesByType('resource')"
                                   ".filter(e => e.name.endsWith('/vote')).map(e => e.duration)")
    print(f"acknowledged after {statistics.median(times):.1f} ms at the median of the last {len(times)}")
    assert statistics.median(times) < 50
    assert not complaints(browser)


HOSTILE = ("<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"> **bold** "
           "&amp; \u202egnp.exe\u202c \u0007 \x1b[31m שלום مرحبا 你好 नमस्ते 🙂 ")


def test_markup_and_control_characters_and_long_replies_are_text(browser, labelling):
    long = "word " * 4000
    labelling([{"prompt": HOSTILE, "completions": [HOSTILE + "one", long]}])
    body = browser.find_element(By.TAG_NAME, "body").text
    assert "<script>" in body and "onerror" in body and "**bold**" in body and "&amp;" in body
    assert "⟨202e⟩" in body and "⟨0007⟩" in body and "⟨001b⟩" in body and "你好" in body
    assert browser.title == "label: compare" and not browser.find_elements(By.TAG_NAME, "img")
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    assert not complaints(browser)


def live(tmp_path):
    return list(Votes(tmp_path / "labels", "me").live().values())


def test_every_action_has_a_key_and_a_button(browser, labelling, tmp_path):
    labelling(PAIRS[:12], "--points", "2", "--repeats", "0")
    for how, expected in ((Keys.ARROW_LEFT, 1), (Keys.ARROW_RIGHT, 2), ("1", 1), ("2", 2)):
        before = done_of(browser)
        press(browser, how)
        wait(browser, lambda: done_of(browser) == before + 1)
        assert live(tmp_path)[-1]["value"] == expected
    for words, field in (("tie", "tie"), ("both good", "both_good"), ("both bad", "both_bad")):
        before = done_of(browser)
        click(browser, words)
        wait(browser, lambda: done_of(browser) == before + 1)
        assert live(tmp_path)[-1]["verdict"] == field
    press(browser, "f")
    press(browser, "n")
    press(browser, "why 1 t u s")
    press(browser, Keys.CONTROL + Keys.ENTER)
    press(browser, "s")
    wait(browser, lambda: done_of(browser) == 8)
    last = live(tmp_path)[-1]
    assert last["skipped"] and last["flagged"] and last["note"] == "why 1 t u s"
    for left in range(7, 3, -1):
        press(browser, "u")
        wait(browser, lambda: done_of(browser) == left)
    assert len(live(tmp_path)) == 4
    press(browser, "?")
    assert "take the last vote back" in text_of(browser, "telling")
    press(browser, Keys.ESCAPE)
    press(browser, "m")
    wait(browser, lambda: "4 votes" in text_of(browser, "telling"))
    press(browser, Keys.ESCAPE)
    assert done_of(browser) == 4 and not complaints(browser)


FOUR = [{"prompt": f"q{i}", "completions": ["x", "y", "z", "v"]} for i in range(4)]


def test_a_ranking_with_equal_places_by_keys_and_by_mouse(browser, labelling, tmp_path):
    labelling(FOUR, "--repeats", "0")
    for keys in ("3", "1", "=", Keys.BACKSPACE, "2", "=", "1", "4"):
        press(browser, keys)
    wait(browser, lambda: done_of(browser) == 1)
    vote = live(tmp_path)[0]
    # Third first, then second and first together, then the last.
    by_place = {place: vote["ranks"][own] for place, own in enumerate(vote["shown"])}
    assert by_place == {2: 0, 1: 1, 0: 1, 3: 2}
    for place in (1, 0, 2, 3):
        browser.find_elements(By.CSS_SELECTOR, ".card button")[place].click()
    wait(browser, lambda: done_of(browser) == 2)
    vote = live(tmp_path)[1]
    assert [vote["ranks"][own] for own in vote["shown"]] == [1, 0, 2, 3]
    press(browser, "t")
    wait(browser, lambda: done_of(browser) == 3)
    assert live(tmp_path)[2]["verdict"] == "tie" and not complaints(browser)


def test_marks_and_steps_one_key_each(browser, labelling, tmp_path):
    labelling(PAIRS[:3], "--ask", "rate", "--aspects", "kind", "true", "--repeats", "0")
    for key in ("5", "4", Keys.BACKSPACE, "3", "2"):
        press(browser, key)
    browser.find_elements(By.CSS_SELECTOR, ".marks button")[-5].click()
    wait(browser, lambda: done_of(browser) == 1)
    vote = live(tmp_path)[0]
    assert [vote["ratings"][own] for own in vote["shown"]] == [{"kind": 5, "true": 3}, {"kind": 2, "true": 1}]
    assert not complaints(browser)


def test_steps_to_the_first_error(browser, labelling, tmp_path):
    rows = [{"prompt": f"q{i}", "completion": "a\nb\nc"} for i in range(2)]
    labelling(rows, "--ask", "steps", "--repeats", "0")
    for key in ("3", "2", Keys.BACKSPACE, "1", "2"):
        press(browser, key)
    wait(browser, lambda: done_of(browser) == 1)
    press(browser, "3")
    press(browser, "e")
    wait(browser, lambda: done_of(browser) == 2)
    assert [vote["labels"] for vote in live(tmp_path)] == [[1, -1, 0], [1, -1, None]]


def test_two_tabs_do_not_vote_twice(browser, labelling, tmp_path):
    one = labelling(PAIRS[:5], "--repeats", "0")
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    browser.get(f"http://127.0.0.1:{one.port}/")
    wait(browser, lambda: text_of(browser, "count"))
    press(browser, "1")
    wait(browser, lambda: done_of(browser) == 1)
    browser.close()
    browser.switch_to.window(first)
    press(browser, "7")
    wait(browser, lambda: "has a vote already" in text_of(browser, "saved"))
    wait(browser, lambda: done_of(browser) == 1)
    assert [vote["value"] for vote in live(tmp_path)] == [1]


@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_wider_than_the_window_and_each_action_is_in_reach(width, browser, labelling):
    labelling([PAIRS[0] | {"completions": ["x" * 500, "short"]}])
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                            {"width": width, "height": 740, "deviceScaleFactor": 1, "mobile": width < 500})
    try:
        assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
        for one in browser.find_elements(By.CSS_SELECTOR, "#controls button"):
            assert one.is_displayed() and one.size["height"] >= 24
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
