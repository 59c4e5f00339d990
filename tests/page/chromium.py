"""A browser for the page's tests: Debian's Chromium, or the one that KVIST_CHROMIUM names."""

import os
import shutil

CHROMIUM = os.environ.get("KVIST_CHROMIUM") or shutil.which("chromium") or ""
