"""Makes a site of the documents: README.md, CONTRIBUTING.md and docs/.

    pip install -e '.[docs]' && python docs/site.py

Every link and anchor is checked: one that leads nowhere is an error. The pages are in build/site.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "build" / "site-pages"


def main() -> None:
    """Gathers the pages in one folder, as mkdocs wants them, and builds the site."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES, ignore=shutil.ignore_patterns("*.py"))
    same = ("CONTRIBUTING.md", "SECURITY.md")
    for name, page in (("README.md", "index.md"), *zip(same, same)):
        text = (ROOT / name).read_text()
        # These stand beside docs/, and in the site beside its pages.
        text = re.sub(r'(\]\(|src="|srcset=")docs/', r"\1", text)
        (PAGES / page).write_text(text.replace("](README.md", "](index.md"))
    for path in PAGES.glob("*.md"):
        text = path.read_text().replace("](../README.md", "](index.md")
        path.write_text(text.replace("](../CONTRIBUTING.md", "](CONTRIBUTING.md"))
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict"], cwd=ROOT)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
