#!/usr/bin/env python3
"""The page in headless Chromium: drop a document, ask, compare, both themes, keys only; screenshots into a folder.

usage: page.py http://127.0.0.1:8080 FOLDER [--browser /usr/bin/chromium]   (pip install playwright)
"""

import argparse
import pathlib

from playwright.sync_api import expect, sync_playwright

parser = argparse.ArgumentParser()
parser.add_argument("url")
parser.add_argument("folder", type=pathlib.Path)
parser.add_argument("--browser")
args = parser.parse_args()
args.folder.mkdir(parents=True, exist_ok=True)
lines = [f"Day {day}: the keeper climbs the stairs, trims the lamp and writes down the weather." for day in range(1, 61)]
lines[40] = "Day 41: the keeper hides the brass key under the third stone of the garden wall."
document = "\n".join(lines)

with sync_playwright() as play:
    browser = play.chromium.launch(executable_path=args.browser, args=["--no-sandbox"])
    page = browser.new_page(viewport={"width": 1360, "height": 860}, color_scheme="light")
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.goto(args.url)
    expect(page.locator("#model")).to_contain_text("window of")
    page.screenshot(path=args.folder / "1-start.png")
    # Dropped, as a person would.
    transfer = page.evaluate_handle(
        "text => { const t = new DataTransfer(); t.items.add(new File([text], 'lighthouse.txt', {type: 'text/plain'})); return t; }", document
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})
    expect(page.locator("#text")).to_contain_text("Day 41")
    page.fill("#question", "Where is the brass key?")
    page.fill("#max", "48")
    page.press("#question", "Control+Enter")
    expect(page.locator(".progress")).to_have_count(1)
    page.wait_for_timeout(400)
    page.screenshot(path=args.folder / "2-reading.png")
    expect(page.locator(".figures").first).to_contain_text("tokens/s", timeout=300_000)
    expect(page.locator(".said").first).not_to_be_empty()
    expect(page.locator("#text mark").first).to_be_attached()
    page.screenshot(path=args.folder / "3-answer.png")
    page.check("#compare")
    page.locator('fieldset[data-side="1"] [name=context]').fill("infllm:n_init=16,n_local=256,block=32,topk=4,exec_block=128,chunk=512")
    page.locator('fieldset[data-side="1"] [name=decode]').fill("sample:temperature=0.7,top_p=0.9,seed=3")
    page.click("#ask")
    expect(page.locator(".figures").nth(1)).to_contain_text("tokens/s", timeout=300_000)
    page.locator(".show").nth(1).click()
    page.screenshot(path=args.folder / "4-compare.png")
    page.click("#theme")
    page.screenshot(path=args.folder / "5-dark.png")
    # With keys alone: from the top, every control is reached and shows it.
    page.evaluate("document.activeElement.blur()")
    reached = []
    for _ in range(24):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.name || document.activeElement.className"))
    assert {"question", "ask", "compare", "choose", "theme", "text"} <= set(reached), reached
    # A mistake is told.
    page.locator('fieldset[data-side="0"] [name=context]').fill("magic")
    page.click("#ask")
    expect(page.locator(".said").first).to_contain_text("unknown", timeout=60_000)
    page.set_viewport_size({"width": 420, "height": 860})
    page.screenshot(path=args.folder / "6-narrow.png", full_page=True)
    # The refusal is the one error that a console should show.
    problems = [problem for problem in problems if "400" not in problem]
    assert not problems, problems
    browser.close()
print("ok")
