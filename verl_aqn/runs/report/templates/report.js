"use strict";
// Light or dark theme: use the setting of the reader's system until the button is used. This runs before the page is drawn.
const root = document.documentElement;
const stored = (() => { try { return localStorage.getItem("verl-aqn-theme"); } catch { return null; } })();
if (stored === "light" || stored === "dark") root.dataset.theme = stored;

document.addEventListener("DOMContentLoaded", () => {
  theme();
  runs();
  cursors(JSON.parse(document.getElementById("data").textContent));
  document.querySelectorAll("table[data-sortable]").forEach(sortable);
  filter();
  parts();
});

function theme() {
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const show = () => { button.textContent = dark() ? "Light theme" : "Dark theme"; };
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("verl-aqn-theme", root.dataset.theme); } catch { /* without storage the choice is not kept */ }
    show();
  });
  system.addEventListener("change", show);
  show();
  button.hidden = false;
}

// Hide a run in all charts at once.
function runs() {
  for (const button of document.querySelectorAll("[data-toggle]")) {
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", shown);
      for (const part of document.querySelectorAll(`[data-run="${button.dataset.toggle}"]`)) {
        part.classList.toggle("off", !shown);
      }
    });
  }
}

// Show one cursor in all charts of a group; the legend shows the values at the cursor.
function cursors(data) {
  const charts = [...document.querySelectorAll("[data-chart]")].map((figure) => ({
    ...data[figure.dataset.chart],
    plot: figure.querySelector("[data-plot]"),
    line: figure.querySelector(".cursor"),
    where: figure.querySelector(".where"),
    name: figure.querySelector(".axis span").textContent,
    key: figure.dataset.chart,
    labels: [...figure.querySelectorAll(".legend li")],
    outputs: [...figure.querySelectorAll(".legend output")],
    last: [...figure.querySelectorAll(".legend output")].map((one) => one.textContent),
  }));

  const nearest = (chart, at) => {
    let best = 0;
    chart.at.forEach((one, index) => { if (Math.abs(one - at) < Math.abs(chart.at[best] - at)) best = index; });
    return best;
  };
  const mark = (chart, index) => {
    chart.line.hidden = false;
    chart.line.style.left = `${chart.at[index]}%`;
    chart.where.textContent = chart.x[index];
    chart.outputs.forEach((output, series) => { output.textContent = chart.text[series][index] || "–"; });
    const spoken = chart.labels.filter((label) => label.offsetParent).map((label) => label.textContent.trim());
    chart.plot.setAttribute("aria-valuenow", index);
    chart.plot.setAttribute("aria-valuetext", `${chart.name} ${chart.x[index]}: ${spoken.join("; ")}`);
  };
  const show = (chart, index) => {
    for (const other of charts) {
      if (other === chart) mark(other, index);
      else if (other.group === chart.group) mark(other, nearest(other, chart.at[index]));
    }
  };
  const clear = () => {
    for (const chart of charts) {
      chart.line.hidden = true;
      chart.where.textContent = "";
      chart.outputs.forEach((output, series) => { output.textContent = chart.last[series]; });
    }
  };

  for (const chart of charts) {
    let index = chart.at.length - 1;
    const point = (event) => {
      const box = chart.plot.getBoundingClientRect();
      index = nearest(chart, (100 * (event.clientX - box.left)) / box.width);
      show(chart, index);
    };
    chart.plot.tabIndex = 0;
    chart.plot.setAttribute("role", "slider");
    chart.plot.setAttribute("aria-labelledby", `t-${chart.key}`);
    chart.plot.setAttribute("aria-describedby", `s-${chart.key}`);
    chart.plot.setAttribute("aria-valuemin", 0);
    chart.plot.setAttribute("aria-valuemax", index);
    chart.plot.setAttribute("aria-valuenow", index);
    chart.plot.addEventListener("pointermove", point);
    chart.plot.addEventListener("pointerdown", point);
    chart.plot.addEventListener("pointerleave", clear);
    chart.plot.addEventListener("blur", clear);
    chart.plot.addEventListener("keydown", (event) => {
      const last = chart.at.length - 1;
      const to = { ArrowLeft: index - 1, ArrowRight: index + 1, ArrowDown: index - 1, ArrowUp: index + 1, Home: 0, End: last }[event.key];
      if (event.key === "Escape") clear();
      if (to === undefined) return;
      event.preventDefault();
      index = Math.min(Math.max(to, 0), last);
      show(chart, index);
    });
  }
}

// Add a button to each header that sorts ascending, then descending. Cells without a value stay last.
function sortable(table) {
  const body = table.tBodies[0];
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = header.textContent;
    header.replaceChildren(button);
    button.addEventListener("click", () => {
      const direction = header.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      headers.forEach((other) => other.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", direction);
      const rows = [...body.rows].map((row) => [value(row.cells[column]), row]);
      const sign = direction === "ascending" ? 1 : -1;
      rows.sort(([one], [other]) => {
        if (one === null || other === null) return (one === null) - (other === null);
        return sign * (typeof one === "number" && typeof other === "number"
          ? one - other : String(one).localeCompare(String(other), undefined, { numeric: true }));
      });
      body.replaceChildren(...rows.map(([, row]) => row));
    });
  });
  function value(cell) {
    if (cell.dataset.sort !== undefined) return Number(cell.dataset.sort);
    const text = cell.textContent.trim();
    return text === "–" || text === "" ? null : text;
  }
}

function filter() {
  const buttons = [...document.querySelectorAll("[data-filter]")];
  for (const button of buttons) {
    button.addEventListener("click", () => {
      for (const other of buttons) other.setAttribute("aria-pressed", other === button);
      for (const item of document.querySelectorAll("[data-kind]")) {
        item.hidden = button.dataset.filter !== "all" && item.dataset.kind !== button.dataset.filter;
      }
    });
  }
}

// With several runs, a chart would have three lines for each run. Show only one part of the difference at a time.
function parts() {
  const buttons = [...document.querySelectorAll("[data-part]")];
  const lines = document.querySelectorAll("#parts [data-dash]");
  for (const button of buttons) {
    button.addEventListener("click", () => {
      for (const other of buttons) other.setAttribute("aria-pressed", other === button);
      for (const line of lines) line.classList.toggle("other", button.dataset.part !== "" && line.dataset.dash !== button.dataset.part);
    });
    button.parentElement.hidden = false;
  }
  if (buttons.length) buttons[0].click();
}
