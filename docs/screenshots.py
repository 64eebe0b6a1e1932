"""Pictures of reports/report.html for the documents, light and dark, drawn by Chromium (Debian: apt install chromium).

python docs/screenshots.py
"""

import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "reports" / "report.html"
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--window-size=1200,1330",
]

for name, flags in (("light", []), ("dark", ["--blink-settings=preferredColorScheme=0"])):
    with tempfile.TemporaryDirectory() as profile:
        picture = ROOT / "docs" / f"report-{name}.png"
        place = [f"--user-data-dir={profile}", f"--screenshot={picture}", "--virtual-time-budget=4000", PAGE.as_uri()]
        subprocess.run(["chromium", *FLAGS, *flags, *place], check=True, capture_output=True)
        print(picture.relative_to(ROOT))
