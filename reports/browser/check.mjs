// Opens pages in headless Chromium, wide and narrow, and runs axe-core on them: node check.mjs FOLDER PAGE.html...
//
// A finding that is serious or critical, or a page wider than its window, ends it with 1. FOLDER gets a picture of each page and width.
// At the end an image without a text is planted into each page: a check that does not find it fails.
import { mkdir } from "node:fs/promises";
import { createRequire } from "node:module";
import { basename, join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

import chromium from "@sparticuz/chromium";
import puppeteer from "puppeteer-core";

const WIDTHS = { 1280: 900, 390: 844 };
const BAD = new Set(["serious", "critical"]);
const AXE = createRequire(import.meta.url).resolve("axe-core/axe.min.js");

const [folder, ...pages] = process.argv.slice(2);
if (!pages.length) {
  console.error("name a folder for the pictures, and one page or more");
  process.exit(2);
}
await mkdir(folder, { recursive: true });

async function findings(page) {
  const found = await page.evaluate(() => globalThis.axe.run(document, { resultTypes: ["violations"] }));
  return found.violations.filter((one) => BAD.has(one.impact));
}

let failed = false;
function fail(said) {
  failed = true;
  console.log(said);
}

// CHROMIUM names another one than that of the package, such as Debian's.
const own = process.env.CHROMIUM;
const browser = await puppeteer.launch({
  executablePath: own || (await chromium.executablePath()),
  args: own ? ["--no-sandbox"] : chromium.args,
  headless: "shell",
});
try {
  for (const file of pages) {
    for (const [width, height] of Object.entries(WIDTHS)) {
      const page = await browser.newPage();
      await page.setBypassCSP(true); // the page allows no script, and axe-core is one
      await page.setViewport({ width: Number(width), height });
      await page.goto(pathToFileURL(resolve(file)).href, { waitUntil: "load" });
      await page.addScriptTag({ path: AXE });
      const name = basename(file, ".html");
      const picture = join(folder, `${name}-${width}.png`);
      const tall = await page.evaluate(() => document.documentElement.scrollHeight);
      // What is taller than a texture of the renderer would be repeated.
      await page.screenshot({ path: picture, clip: { x: 0, y: 0, width: Number(width), height: Math.min(tall, 8000) } });
      const bad = await findings(page);
      for (const one of bad) {
        const where = one.nodes.slice(0, 3).map((node) => node.target.join(" ")).join("; ");
        fail(`${file} at ${width}: ${one.impact}: ${one.help} (${one.id}) at ${where}`);
      }
      const wide = await page.evaluate(() => document.documentElement.scrollWidth);
      if (wide > Number(width)) fail(`${file} at ${width}: the page is ${wide} pixels wide`);
      if (!bad.length) console.log(`${file} at ${width}: nothing serious; ${picture}`);
      await page.evaluate(() => document.querySelector("main, body").append(document.createElement("img")));
      if (!(await findings(page)).some((one) => one.id === "image-alt")) {
        fail(`${file} at ${width}: an image without a text was planted and not found`);
      }
      await page.close();
    }
  }
} finally {
  await browser.close();
}
process.exit(failed ? 1 : 0);
