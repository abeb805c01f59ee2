// Opens pages in headless Chromium and runs axe-core on them: node check.mjs FOLDER PAGE.html...
//
// Each page is opened wide and narrow, in light and in dark, walked through with the Tab key, read as a screen reader gets it, and
// printed on A4. What ends it with 1: a finding that is serious or critical; a page wider than its window or its paper; a place that
// the key does not reach, or reaches without a mark; a heading that skips a level; a table without a name.
// FOLDER gets pictures of each page, width and scheme from top to bottom, and the PDF. At the end of each a fault is planted: a check that does not
// find it fails.
import { mkdir } from "node:fs/promises";
import { createRequire } from "node:module";
import { basename, dirname, join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

import chromium from "@sparticuz/chromium";
import puppeteer from "puppeteer-core";

const WIDTHS = { 1280: 900, 390: 844 };
const SCHEMES = ["light", "dark"];
const BAD = new Set(["serious", "critical"]);
const AXE = createRequire(import.meta.url).resolve("axe-core/axe.min.js");
// Of A4 with the margins of the page's own style: 210 mm less 14 on each side.
const PAPER = 688;

// Pixels of a picture from top to bottom.
const PART = 2400;

// A page is called by its run's folder too, since all runs have pages of one name.
const called = (file) => `${basename(dirname(resolve(file)))}-${basename(file, ".html")}`;

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

// Presses Tab from the top; returns what should be reached, and what is wrong with how it was.
async function walked(page) {
  const wanted = await page.evaluate(() => {
    const found = document.querySelectorAll("a[href], button, input, select, summary, [tabindex='0']");
    const all = [...found].filter((one) => one.checkVisibility()); // what is folded is not there for the key
    all.forEach((one, number) => (one.dataset.place = number));
    document.activeElement?.blur();
    return all.length;
  });
  const wrong = [];
  for (let number = 0; number < wanted; number += 1) {
    await page.keyboard.press("Tab");
    const at = await page.evaluate(() => {
      const one = document.activeElement;
      const style = getComputedStyle(one);
      return { place: one.dataset.place, mark: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 0 };
    });
    if (at.place !== String(number)) wrong.push(`Tab number ${number + 1} is at ${at.place ?? "nothing"}`);
    else if (!at.mark) wrong.push(`Tab number ${number + 1} leaves no mark`);
  }
  return { wanted, wrong };
}

// What a screen reader goes by, from the browser's own tree: headings in order, and tables and regions with names.
async function read(page) {
  const wrong = [];
  let level = 0;
  const visit = (node) => {
    if (node.role === "heading") {
      if (node.level > level + 1) wrong.push(`heading ${node.name} is of level ${node.level} after ${level}`);
      level = node.level;
    }
    if (["table", "region", "figure", "image", "img"].includes(node.role) && !node.name) wrong.push(`a ${node.role} has no name`);
    node.children?.forEach(visit);
  };
  visit(await page.accessibility.snapshot({ interestingOnly: false }));
  return wrong;
}

// The widest that the content is on paper of this width.
async function printed(page, width) {
  await page.emulateMediaType("print");
  await page.setViewport({ width, height: 1000 });
  const wide = await page.evaluate(() => document.documentElement.scrollWidth);
  await page.emulateMediaType(); // printing sees the page's style for paper by itself
  return wide;
}

let failed = false;
function fail(said) {
  failed = true;
  console.log(said);
}

async function opened(browser, file, width, height, scheme) {
  const page = await browser.newPage();
  await page.setBypassCSP(true); // the page allows no script, and axe-core is one
  await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
  await page.setViewport({ width, height });
  await page.goto(pathToFileURL(resolve(file)).href, { waitUntil: "load" });
  await page.addScriptTag({ path: AXE });
  return page;
}

async function look(browser, file, width, height, scheme) {
  const page = await opened(browser, file, width, height, scheme);
  const where = `${file} at ${width}, ${scheme}`;
  const tall = await page.evaluate(() => document.documentElement.scrollHeight);
  const picture = (number) => join(folder, `${called(file)}-${width}-${scheme}-${number}.png`);
  // What is taller than a texture of the renderer would be repeated, and a long picture is hard to look at.
  for (let y = 0; y < tall; y += PART) {
    await page.screenshot({ path: picture(y / PART + 1), clip: { x: 0, y, width, height: Math.min(tall - y, PART) } });
  }
  const bad = await findings(page);
  for (const one of bad) {
    const at = one.nodes.slice(0, 3).map((node) => node.target.join(" ")).join("; ");
    fail(`${where}: ${one.impact}: ${one.help} (${one.id}) at ${at}`);
  }
  const wide = await page.evaluate(() => document.documentElement.scrollWidth);
  if (wide > width) fail(`${where}: the page is ${wide} pixels wide`);
  const { wanted, wrong } = await walked(page);
  for (const text of [...wrong, ...(await read(page))]) fail(`${where}: ${text}`);
  if (!bad.length && !wrong.length) console.log(`${where}: nothing serious, ${wanted} places by key; ${picture(1)}`);
  await page.evaluate(() => {
    const main = document.querySelector("main, body");
    main.append(document.createElement("img"));
    main.insertAdjacentHTML("afterbegin", '<a href="#x" tabindex="2" style="outline: none">x</a><h6>x</h6>');
  });
  const planted = await findings(page);
  if (!planted.some((one) => one.id === "image-alt")) fail(`${where}: an image without a text was planted and not found`);
  if (!(await walked(page)).wrong.length) fail(`${where}: a link without a mark was planted and not found`);
  if (!(await read(page)).some((text) => text.includes("level 6"))) fail(`${where}: a heading was planted and not found`);
  await page.close();
}

async function print(browser, file) {
  const page = await opened(browser, file, 1280, 900, "light");
  const wide = await printed(page, PAPER);
  if (wide > PAPER) fail(`${file} on A4: the content is ${wide} pixels wide, the paper has ${PAPER}`);
  const path = join(folder, `${called(file)}.pdf`);
  const content = await page.pdf({ path, format: "A4", preferCSSPageSize: true, printBackground: true });
  const sheets = (Buffer.from(content).toString("latin1").match(/\/Type\s*\/Page\b/g) ?? []).length;
  if (!sheets) fail(`${file} on A4: ${sheets} pages`);
  else console.log(`${file} on A4: ${sheets} pages, ${wide} of ${PAPER} pixels wide; ${path}`);
  await page.evaluate(() => document.querySelector("main, body").insertAdjacentHTML("beforeend", "<pre>" + "x".repeat(400) + "</pre>"));
  if ((await printed(page, PAPER)) <= PAPER) fail(`${file} on A4: a line that is too wide was planted and not found`);
  await page.close();
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
      for (const scheme of SCHEMES) await look(browser, file, Number(width), height, scheme);
    }
    await print(browser, file);
  }
} finally {
  await browser.close();
}
process.exit(failed ? 1 : 0);
