"""The report in a real browser: it runs its script, complains of nothing, asks nobody for anything."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from asr.decoding.results import write_results
from asr.decoding.score import Transcribed
from asr.training.report import write_report

CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
         "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--log-level=0"]  # fmt: skip
EVIL = '<script>document.title="pwned"</script><img src=x onerror=document.title="pwned">'

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium found: apt-get install chromium"),
]


def browse(page: Path, profile: Path, *flags: str) -> tuple[str, list[str]]:
    """The DOM after the page's script ran, and what the page wrote to the console."""
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, re.findall(r"CONSOLE[:(].*", done.stderr)


@pytest.fixture
def report(tmp_path: Path) -> Path:
    train_dir = tmp_path / "exp" / "train"
    train_dir.mkdir(parents=True)
    records = [{"kind": "start", "command": EVIL, "parameters": 1000, "device": "cpu"}]
    step = {"kind": "train", "lr": 0.1, "grad_norm": 1.0}
    records += [step | {"step": s, "loss": 9.0 / s, "time_s": s} for s in range(1, 99)]
    records += [{"kind": "bad_batch", "step": 7, "reason": EVIL, "cut_ids": [EVIL]}]
    (train_dir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (train_dir / "config.yaml").write_text(f"name: 'run {EVIL}'\n")
    texts = [Transcribed(EVIL, f"a {EVIL}", EVIL), Transcribed("u", "one two", "one")]
    write_results(tmp_path / "exp" / "decode" / "greedy", "test", EVIL, texts)
    return write_report(train_dir)


def test_runs_clean(report: Path, tmp_path: Path) -> None:
    dom, console = browse(report, tmp_path / "profile", "--dump-dom")
    assert 'data-ready="1"' in dom  # the page's own script came to its end under the content security policy
    assert "<title>run &lt;script&gt;" in dom and "<title>pwned" not in dom
    assert console == []


def test_console_lines_and_blocked_requests_would_be_seen(report: Path, tmp_path: Path) -> None:
    bad = report.with_name("bad.html")
    outside = '<img src="https://example.invalid/a.png"><script>document.title="pwned"</script></main>'
    bad.write_text(report.read_text(encoding="utf-8").replace("</main>", outside), encoding="utf-8")
    dom, console = browse(bad, tmp_path / "profile", "--dump-dom")
    assert any("https://example.invalid/a.png" in line for line in console)
    assert "<title>pwned" not in dom  # the policy holds even where escaping would have failed


def requests_of(page: Path, folder: Path) -> list[str]:
    """Addresses that the browser asked for, without its own maker's and those on this machine's disk."""
    log = folder / f"{page.stem}.json"
    browse(page, folder / f"profile-{page.stem}", "--dump-dom", f"--log-net-log={log}")
    found = re.findall(r'"url":"([^"]+)"', log.read_text(errors="replace"))
    own = re.compile(r"^(file|data|chrome)|://[^/]*(google|gstatic|chrome)")
    return [url for url in found if not own.search(url)]


def test_asks_nobody_for_anything(report: Path, tmp_path: Path) -> None:
    assert requests_of(report, tmp_path) == []
    asking = report.with_name("asking.html")
    page = re.sub(r"<meta http-equiv[^>]*>", "", report.read_text(encoding="utf-8"))
    asking.write_text(page.replace("</main>", '<img src="https://example.invalid/a.png"></main>'), encoding="utf-8")
    assert "https://example.invalid/a.png" in requests_of(asking, tmp_path)


def test_tooltip_follows_the_pointer(report: Path, tmp_path: Path) -> None:
    page = re.sub(r"<meta http-equiv[^>]*>", "", report.read_text(encoding="utf-8"))
    move = """<script>
      const area = document.querySelector("[data-chart] .area"), box = area.getBoundingClientRect();
      area.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width / 2, clientY: box.top + 9}));
    </script></body>"""
    moved = report.with_name("moved.html")
    moved.write_text(page.replace("</body>", move), encoding="utf-8")
    dom, console = browse(moved, tmp_path / "profile", "--dump-dom")
    assert console == []
    tip = re.search(r'<div class="tip"[^>]*>(.*?)</div></div>', dom)
    assert tip and re.search(r"step (49|50)\b", tip[1]) and "training" in tip[1]


@pytest.mark.parametrize("width", [360, 1280])
def test_fits_the_screen(report: Path, tmp_path: Path, width: int) -> None:
    page = re.sub(r"<meta http-equiv[^>]*>", "", report.read_text(encoding="utf-8"))
    # A frame has the width that is asked for; a window of the browser may refuse to be as narrow as a phone.
    frame = report.with_name("frame.html")
    inner = report.with_name("inner.html")
    tell = "<script>parent.postMessage(document.documentElement.scrollWidth, '*')</script>"
    inner.write_text(page.replace("</body>", tell + "</body>"), encoding="utf-8")
    frame.write_text(
        f'<iframe src="inner.html" width="{width}" height="900" style="border:0"></iframe><p id="w"></p>'
        '<script>onmessage = e => document.getElementById("w").textContent = "width " + e.data</script>'
    )
    dom, _ = browse(frame, tmp_path / "profile", "--window-size=1400,1000", "--virtual-time-budget=2000", "--dump-dom")
    assert f"width {width}<" in dom
    picture = tmp_path / "page.png"
    browse(report, tmp_path / "profile2", f"--screenshot={picture}", f"--window-size={max(width, 500)},900")
    assert picture.stat().st_size > 10_000
