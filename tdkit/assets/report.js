// Figure 4: two scatter plots whose points say what they are, by pointer, finger or keyboard.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("candidates").textContent);
  const root = document.getElementById("scatters");
  if (!data.points.length) return;
  const SVG = "http://www.w3.org/2000/svg";
  const control = (name) => root.querySelector(`[name="${name}"]`);
  const SHAPES = {
    o: "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0Z",
    s: "M-3.6,-3.6H3.6V3.6H-3.6Z",
    D: "M0,-5L5,0L0,5L-5,0Z",
    "^": "M0,-5L4.8,3.6H-4.8Z",
    v: "M0,5L4.8,-3.6H-4.8Z",
    P: "M-1.6,-4.8H1.6V-1.6H4.8V1.6H1.6V4.8H-1.6V1.6H-4.8V-1.6H-1.6Z",
    X: "M-4.4,-2.4L-2.4,-4.4L0,-2L2.4,-4.4L4.4,-2.4L2,0L4.4,2.4L2.4,4.4L0,2L-2.4,4.4L-4.4,2.4L-2,0Z",
    "*": "M0,-5.4L1.3,-1.8L5.1,-1.7L2.1,0.7L3.2,4.4L0,2.2L-3.2,4.4L-2.1,0.7L-5.1,-1.7L-1.3,-1.8Z",
  };

  function element(parent, name, attributes, text) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return parent.appendChild(made);
  }

  const minus = (text) => text.replace("-", "−");
  const short = (value) => minus(Number(value.toPrecision(3)).toString());
  const percent = (value) => (100 * value).toFixed(2);

  function linear(values) {
    let low = Math.min(...values), high = Math.max(...values);
    if (low === high) { low -= Math.abs(low) / 2 || 1; high += Math.abs(high) / 2 || 1; }
    const room = (high - low) * 0.05;
    low = low >= 0 ? Math.max(0, low - room) : low - room;
    high += room;
    const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.8);
    const ticks = [];
    for (let i = Math.ceil(low / step); i * step <= high; i += 1) ticks.push(i * step);
    return { at: (v) => (v - low) / (high - low), ticks };
  }

  function logarithmic(values) {
    const logs = values.map(Math.log10);
    let low = Math.min(...logs), high = Math.max(...logs);
    const room = (high - low) * 0.05 || 0.5;
    low -= room; high += room;
    const ticks = [];
    const steps = high - low > 3 ? [1] : high - low > 0.9 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 8];
    for (let power = Math.floor(low); power <= high; power += 1) {
      for (const step of steps) {
        const tick = step * 10 ** power, log = Math.log10(tick);
        if (log >= low && log <= high) ticks.push(tick);
      }
    }
    return { at: (v) => (Math.log10(v) - low) / (high - low), ticks };
  }

  function describe(point, metric) {
    const runs = data.runs[point.stage] > 1 ? `, run ${point.run + 1}` : "";
    return {
      name: `${data.layers[point.layer]} · ${data.methods[point.method]} · keep ${point.keep}`,
      lines: [
        `rank ${point.rank}${runs}, saves ${point.saved.toLocaleString("en")} parameters`,
        `${data.metrics[metric]} error ${short(point.errors[metric])}`,
        `performance error ${percent(point.error)} % (${percent(point.low)} to ${percent(point.high)})`,
      ],
    };
  }

  class Scatter {
    constructor(panel, select) {
      this.panel = panel;
      this.select = control(select);
      this.tip = document.createElement("div");
      this.tip.className = "tip";
      this.tip.hidden = true;
      this.tip.setAttribute("aria-hidden", "true");
      this.width = 0;
      for (const chosen of root.querySelectorAll("select, input")) {
        chosen.addEventListener("change", () => this.draw());
      }
      new ResizeObserver(() => {
        if (panel.clientWidth !== this.width) this.draw();
      }).observe(panel);
    }

    chosen() {
      const metric = Number(this.select.value);
      const stage = control("stage") ? control("stage").value : data.stages[0];
      const keeps = control("keeps").value === "focus" ? data.focus : data.keeps;
      const log = control("log").checked;
      const usable = (v) => Number.isFinite(v) && (!log || v > 0);
      const points = data.points.filter((p) => p.stage === stage && keeps.includes(p.keep)
        && usable(p.errors[metric]) && usable(p.error));
      return { metric, stage, log, points };
    }

    draw() {
      const { metric, stage, log, points } = this.chosen();
      const width = this.width = this.panel.clientWidth;
      if (!width) return;
      const height = Math.round(Math.min(380, 0.85 * width));
      const box = { left: 44, right: width - 10, top: 30, bottom: height - 44 };
      this.panel.replaceChildren();
      const tau = (data.tau[stage] || {})[metric];
      const title = `${data.metrics[metric]}${tau ? `, τ ${tau}` : ""}`;
      const svg = this.svg = element(this.panel, "svg", {
        class: "scatter", viewBox: `0 0 ${width} ${height}`, role: "group",
        "aria-label": `${title}: ${points.length} candidates; arrow keys go from point to point`,
      });
      element(svg, "text", { x: 0, y: 14, style: "font-weight: 600" }, title);
      this.panel.append(this.tip);
      this.tip.hidden = true;
      this.marks = [];
      this.current = null;
      if (!points.length) {
        element(svg, "text", { x: box.left, y: 60 }, "nothing was measured here");
        return;
      }
      this.axes(svg, box, metric, points, log);
      this.points(svg, metric, points);
      svg.addEventListener("pointermove", (event) => this.near(event));
      svg.addEventListener("pointerdown", (event) => this.near(event));
      svg.addEventListener("pointerleave", () => this.leave());
      svg.addEventListener("keydown", (event) => this.key(event));
    }

    axes(svg, box, metric, points, log) {
      const scale = log ? logarithmic : linear;
      const x = scale(points.map((p) => p.errors[metric])), y = scale(points.map((p) => 100 * p.error));
      this.x = (v) => box.left + x.at(v) * (box.right - box.left);
      this.y = (v) => box.bottom - y.at(100 * v) * (box.bottom - box.top);
      for (const tick of x.ticks) {
        const at = this.x(tick);
        element(svg, "line", { class: "grid", x1: at, x2: at, y1: box.top, y2: box.bottom });
        element(svg, "text", { x: at, y: box.bottom + 16, "text-anchor": "middle" }, short(tick));
      }
      for (const tick of y.ticks) {
        const at = this.y(tick / 100);
        element(svg, "line", { class: "grid", x1: box.left, x2: box.right, y1: at, y2: at });
        element(svg, "text", { x: box.left - 6, y: at + 4, "text-anchor": "end" }, short(tick));
      }
      element(svg, "path", { class: "axis", fill: "none",
        d: `M${box.left},${box.top}V${box.bottom}H${box.right}` });
      element(svg, "text", { x: (box.left + box.right) / 2, y: box.bottom + 36, "text-anchor": "middle" },
        `${data.metrics[metric]} error`);
      element(svg, "text", { "text-anchor": "middle",
        transform: `translate(11 ${(box.top + box.bottom) / 2}) rotate(-90)` }, "performance error (%)");
    }

    points(svg, metric, points) {
      this.bar = element(svg, "line", { class: "bar", visibility: "hidden" });
      const ordered = [...points].sort((a, b) => a.errors[metric] - b.errors[metric]);
      this.marks = ordered.map((point, place) => {
        const x = this.x(point.errors[metric]), y = this.y(point.error);
        const said = describe(point, metric);
        const node = element(svg, "path", {
          class: "point", d: SHAPES[data.markers[point.method]] || SHAPES.o,
          transform: `translate(${x} ${y})`, style: `fill: ${data.colours[point.layer]}`,
          tabindex: place ? -1 : 0, role: "img", "aria-label": [said.name, ...said.lines].join(", "),
        });
        const mark = { point, x, y, node, said };
        node.addEventListener("focus", () => this.show(mark));
        node.addEventListener("blur", () => this.hide());
        return mark;
      });
    }

    near(event) {
      const box = this.svg.getBoundingClientRect();
      const scale = this.width / box.width;
      const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
      let best = null, least = event.pointerType === "mouse" ? 14 : 28;
      for (const mark of this.marks) {
        const distance = Math.hypot(mark.x - x, mark.y - y);
        if (distance < least) { least = distance; best = mark; }
      }
      if (best) this.show(best); else this.hide();
    }

    leave() {
      const focused = this.marks.find((mark) => mark.node === document.activeElement);
      if (focused) this.show(focused); else this.hide();
    }

    key(event) {
      const place = this.marks.findIndex((mark) => mark.node === document.activeElement);
      const last = this.marks.length - 1;
      const next = { ArrowRight: place + 1, ArrowUp: place + 1, ArrowLeft: place - 1,
        ArrowDown: place - 1, Home: 0, End: last }[event.key];
      if (event.key === "Escape") this.hide();
      if (next === undefined || place < 0) return;
      event.preventDefault();
      const target = this.marks[Math.min(Math.max(next, 0), last)];
      this.marks[place].node.setAttribute("tabindex", -1);
      target.node.setAttribute("tabindex", 0);
      target.node.focus();
    }

    show(mark) {
      if (this.current) this.current.node.classList.remove("on");
      this.current = mark;
      mark.node.classList.add("on");
      const { point } = mark;
      for (const [key, value] of Object.entries({ x1: mark.x, x2: mark.x, visibility: "visible",
        y1: this.y(point.low || point.error), y2: this.y(point.high) })) this.bar.setAttribute(key, value);
      const name = document.createElement("strong");
      name.textContent = mark.said.name;
      const lines = mark.said.lines.map((line) => {
        const made = document.createElement("div");
        made.textContent = line;
        return made;
      });
      this.tip.replaceChildren(name, ...lines);
      this.tip.hidden = false;
      const scale = this.panel.clientWidth / this.width;
      const left = mark.x * scale - this.tip.offsetWidth / 2;
      const most = this.panel.clientWidth - this.tip.offsetWidth;
      const above = mark.y * scale - this.tip.offsetHeight - 14;
      this.tip.style.left = `${Math.max(0, Math.min(left, most))}px`;
      this.tip.style.top = `${above > -30 ? above : mark.y * scale + 16}px`;
    }

    hide() {
      if (this.current) this.current.node.classList.remove("on");
      this.current = null;
      if (this.bar) this.bar.setAttribute("visibility", "hidden");
      this.tip.hidden = true;
    }
  }

  for (const panel of root.querySelectorAll(".panel")) new Scatter(panel, panel.dataset.select);
})();
