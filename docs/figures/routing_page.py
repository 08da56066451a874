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
    page.locator("[data-images] button").nth(5).click()
    page.locator("#explorer").evaluate("it => it.scrollIntoView()")
    place = page.locator("#explorer").bounding_box()
    words = page.locator("[data-words-part]").bounding_box()
    assert place is not None and words is not None
    height = words["y"] + words["height"] - place["y"] + 24
    clip = {"x": place["x"] - 16, "y": place["y"] - 8, "width": place["width"] + 32, "height": height}
    page.screenshot(path=sys.argv[2], clip=clip, full_page=False)
    browser.close()
