"""The site in a browser: no page is wider than a phone's or a desktop's window, no picture is missing."""

import functools
import http.server
import json
import queue
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
CHECK = """<body><script>
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
    if (image.complete && !image.naturalWidth) found.push(`${page}: lacks ${image.getAttribute('src')}`);
  if (!inside.querySelector('article h1')) found.push(`${page}: empty`);
  frame.remove();
}
(async () => {
  for (const page of pages) for (const width of [1280, 390]) await look(page, width);
  await fetch('/found', {method: 'POST', body: JSON.stringify([pages.length, found])});
})();
</script>"""


FOUND: queue.Queue[list[object]] = queue.Queue()


class Site(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, says nothing, and takes what the page has found."""

    def log_message(self, *_):
        pass

    def do_POST(self):
        FOUND.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()


def seen(site, pages, profile):
    """What a browser finds wrong with the pages: how many it saw, and a line for each fault."""
    (site / "check.html").write_text(CHECK.replace("PAGES", json.dumps(pages)), encoding="utf-8")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Site, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/check.html"
        options = [*FLAGS, f"--user-data-dir={profile}", "--remote-debugging-port=0", address]  # the port keeps it open
        browser = subprocess.Popen([CHROMIUM or "", *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            return FOUND.get(timeout=600)
        finally:
            browser.terminate()
            browser.wait()
            server.shutdown()


@pytest.mark.nightly
def test_no_page_is_wider_than_its_window(tmp_path):
    if CHROMIUM is None:
        pytest.skip("no chromium here")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(site)]
    subprocess.run(command, cwd=ROOT, check=True)
    pages = sorted(f"/{path.relative_to(site)}" for path in site.rglob("index.html"))
    assert seen(site, pages, tmp_path / "profile") == [len(pages), []]
    (site / "wide.html").write_text("<article><h1 style='width: 700px'>wide</h1><img src='no.png'></article>")
    assert seen(site, ["/wide.html"], tmp_path / "again") == [
        1,
        ["/wide.html: lacks no.png", "/wide.html at 390: 708 wide", "/wide.html: lacks no.png"],
    ]
