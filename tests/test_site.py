"""The site in a browser: no page is wider than a phone's or a desktop's window, no picture is missing."""

import functools
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
OFFLINE = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", *OFFLINE]
CHECK = """<pre id="found"></pre><script>
const pages = PAGES, found = [];
async function look(page, width) {
  const frame = document.createElement('iframe');
  frame.style = `width: ${width}px; height: 900px; border: 0`;
  frame.src = page;
  await new Promise(done => { frame.onload = done; document.body.append(frame); });
  const inside = frame.contentDocument;
  const wide = inside.scrollingElement.scrollWidth;
  if (wide > width) found.push(`${page} at ${width}: ${wide} wide`);
  for (const image of inside.images)
    if (image.complete && !image.naturalWidth) found.push(`${page}: lacks ${image.src}`);
  if (!inside.querySelector('article h1')) found.push(`${page}: empty`);
  frame.remove();
}
(async () => {
  for (const page of pages) for (const width of [1280, 390]) await look(page, width);
  document.getElementById('found').textContent = JSON.stringify([pages.length, found]);
})();
</script>"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and says nothing."""

    def log_message(self, *_):
        pass


@pytest.mark.nightly
def test_no_page_is_wider_than_its_window(tmp_path):
    if CHROMIUM is None:
        pytest.skip("no chromium here")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(site)]
    subprocess.run(command, cwd=ROOT, check=True)
    pages = sorted(f"/{path.relative_to(site)}" for path in site.rglob("index.html"))
    (site / "check.html").write_text(CHECK.replace("PAGES", json.dumps(pages)), encoding="utf-8")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_address[1]}/check.html"
        options = [*FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=600000", "--dump-dom"]
        done = subprocess.run([CHROMIUM, *options, address], capture_output=True, text=True, timeout=600, check=True)
    finally:
        server.shutdown()
    found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.S)
    assert found, done.stdout[-500:]
    assert json.loads(found[1]) == [len(pages), []]
