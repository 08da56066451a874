"""A picture of a report's routing to explore: python docs/figures/routing_page.py REPORT.html PICTURE.png"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

with sync_playwright() as started:
    path = shutil.which("chromium") or shutil.which("google-chrome")
    browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
    page = browser.new_page(viewport={"width": 1280, "height": 1180}, color_scheme="light")
    page.goto(Path(sys.argv[1]).resolve().as_uri())
    page.locator("[data-images] button").nth(3).click()
    place, words = (page.locator(name).bounding_box() for name in ("#explorer", "[data-words-part]"))
    assert place is not None and words is not None
    height = words["y"] + words["height"] - place["y"] + 24
    top = place["y"] + page.evaluate("window.scrollY") - 16
    clip = {"x": place["x"] - 16, "y": top, "width": place["width"] + 32, "height": height + 16}
    page.screenshot(path=sys.argv[2], clip=clip, full_page=True)
    browser.close()
