"use strict";
// Everything here adds to a page that is complete without it: themes by hand, sorting, live charts.

const themes = ["auto", "light", "dark"];
const button = document.querySelector("button.theme");

function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  button.textContent = `Theme: ${theme}`;
  button.dataset.now = theme;
}

function stored() {
  try {
    return localStorage.getItem("toolchain-report-theme");
  } catch {
    return null; // pages opened as files may have no storage
  }
}

button.hidden = false;
setTheme(themes.includes(stored()) ? stored() : "auto");
button.addEventListener("click", () => {
  const theme = themes[(themes.indexOf(button.dataset.now) + 1) % themes.length];
  setTheme(theme);
  try {
    localStorage.setItem("toolchain-report-theme", theme);
  } catch {
    return;
  }
});

function sortBy(header, index, numeric) {
  const table = header.closest("table");
  const descending = header.getAttribute("aria-sort") === (numeric ? "descending" : "ascending") ? !numeric : numeric;
  const key = (row) => row.cells[index].dataset.v;
  const order = (a, b) => (numeric ? a - b : a.localeCompare(b, "en", { numeric: true }));
  const rows = [...table.tBodies[0].rows];
  rows.sort((one, other) => {
    const [a, b] = [key(one), key(other)];
    if (a === undefined || b === undefined) return (a === undefined) - (b === undefined); // no figure: last
    return descending ? order(b, a) : order(a, b);
  });
  for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", descending ? "descending" : "ascending");
  table.tBodies[0].append(...rows);
}

for (const header of document.querySelectorAll("thead th")) {
  if (header.closest("table").tBodies[0].rows.length < 2) continue;
  const sorter = document.createElement("button");
  sorter.type = "button";
  sorter.append(...header.childNodes);
  header.append(sorter);
  sorter.addEventListener("click", () => sortBy(header, header.cellIndex, header.classList.contains("number")));
}

const options = { mode: "vega-lite", renderer: "svg", actions: false, ast: true, defaultStyle: false };

async function enliven(figure) {
  const spec = JSON.parse(figure.querySelector("script").textContent);
  const live = figure.querySelector(".live");
  const picture = figure.querySelector(".picture");
  spec.width = "container";
  spec.autosize = { type: "fit-x", contains: "padding" };
  live.hidden = false;
  try {
    await window.vegaEmbed(live, spec, { ...options, tooltip: { disableDefaultStyle: true } });
    live.querySelector("svg").setAttribute("aria-hidden", "true"); // the place around it says what it shows
    picture.classList.add("replaced");
    figure.dataset.live = "yes";
  } catch (error) {
    live.hidden = true; // the picture stays
    console.error(error);
  }
}

// A heat map of a large model has ten thousand rectangles: charts come to life when they are scrolled to.
const watcher = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      watcher.unobserve(entry.target);
      enliven(entry.target);
    }
  },
  { rootMargin: "200px" },
);
for (const figure of document.querySelectorAll("figure.chart")) watcher.observe(figure);
