"""Pages in a real browser, headless Chromium; tests are skipped where there is none."""

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    " --disable-background-networking --disable-component-update --virtual-time-budget=9000"
    " --allow-file-access-from-files --disable-web-security"
).split()


def find():
    """The browser's path; the test is skipped where there is none."""
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        pytest.skip("needs a browser: install Chromium (Debian: apt-get install chromium)")
    return browser


def look(page, script, directory, width=1300, dark=False):
    """What `script`, the body of a function of `window` and `document`, returns in the page.

    The page stands in a frame, because a headless window is never as narrow as a phone.

    Args:
        page: Its HTML, or the path of its file.
        directory: For the profile of the browser.
    """
    browser = find()
    source = f'src="{page.as_uri()}"' if isinstance(page, Path) else f'srcdoc="{escape(page)}"'
    frame = f'<iframe {source} width="{width}" height="900"></iframe>'
    run = f"""<script>onload = async () => {{
        await new Promise(then => setTimeout(then, 3000))  // formulas are set by a script
        const window = document.querySelector("iframe").contentWindow
        const answer = ((window, document) => {{ {script} }})(window, window.document)
        document.body.textContent = JSON.stringify(answer)
    }}</script>"""
    file = directory / f"frame{width}{dark}.html"
    file.write_text(f"<!DOCTYPE html><html><body>{frame}{run}</body></html>", "utf-8")
    done = subprocess.run(
        [
            *(browser, *ARGUMENTS, f"--user-data-dir={directory / 'profile'}"),
            *("--window-size=1400,1000", "--dump-dom"),
            *(["--blink-settings=preferredColorScheme=0"] if dark else []),
            file.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    answer = re.search(r"<body>(.*)</body>", done.stdout, re.DOTALL)
    assert answer and "<iframe" not in answer[1], done.stderr[-2000:]
    return json.loads(unescape(answer[1]))
