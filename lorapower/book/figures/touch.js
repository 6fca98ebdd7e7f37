// Draws a figure with controls in place of its picture, from the numbers beside it. All are results
// of the run: only coordinates are computed here.
(() => {
  const root = document.currentScript.closest(".touch");
  const data = JSON.parse(root.querySelector("[type='application/json']").textContent);
  const names = Object.keys(data.spectra);
  const [WIDTH, HEIGHT] = [360, 262];
  const BOX = { left: 62, right: WIDTH - 12, top: 38, bottom: HEIGHT - 40 };
  const STRIP = 0.15; // the part of the axis that holds all that is rounding
  const LEAST = 1e-17; // drawn at the foot of the strip

  const make = (name, attributes = {}, ...children) => {
    const space = /^(svg|path|line|circle|rect|text)$/.test(name)
      ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml";
    const element = document.createElementNS(space, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  };
  const text = (x, y, said, kind = "") => make("text", { x, y, class: kind }, said);
  const line = (x1, y1, x2, y2, kind) => make("line", { x1, y1, x2, y2, class: kind });
  const path = (points, kind) => make("path", {
    d: points.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`)
      .reduce((sum, point) => `${sum}${sum ? "L" : "M"}${point}`, ""),
    class: kind,
  });
  const scale = (from, to, low, high) => (value) =>
    low + ((value - from) / (to - from)) * (high - low);
  const steps = (low, high, most) => {
    const rough = (high - low) / most;
    const unit = 10 ** Math.floor(Math.log10(rough));
    const step = unit * [1, 2, 5, 10].find((times) => times * unit >= rough);
    const first = Math.ceil(low / step);
    return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, i) =>
      Number(((first + i) * step).toPrecision(6)));
  };

  // Controls: a value's place among all that were tried, and a label that is read with it.
  const slider = (label, values, start, unit) => {
    const shown = make("b", { "aria-hidden": "true" });
    const input = make("input", { type: "range", min: 0, max: values.length - 1, value: start });
    const value = () => values[Number(input.value)];
    const say = () => {
      shown.textContent = value();
      input.setAttribute("aria-valuetext", `${unit} ${value()}`);
    };
    input.addEventListener("input", say);
    say();
    return { field: make("label", {}, `${label} `, shown, input), input };
  };
  const rank = slider("Rank R of each adapter:", data.ranks, data.start[0], "rank");
  const depth = slider("Frozen layers L:", data.depths, data.start[1], "layers");
  const choice = make("select", {}, ...names.map((name) => make("option", {}, name)));
  choice.selectedIndex = data.start[2];
  const bars = make("svg", { viewBox: "0 0 104 52", "aria-hidden": "true" });
  const state = make("p", { class: "touch-state", "aria-live": "polite" });

  const panel = (title, xlabel, legend) => {
    // What leaves the axes is cut there.
    const [edge, room] = [BOX.top - 4, BOX.bottom - BOX.top + 12];
    const layer = make("svg", { y: edge, width: WIDTH, height: room, viewBox: `0 ${edge} ${WIDTH} ${room}` });
    const svg = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": title },
      text(BOX.left, 14, title), text((BOX.left + BOX.right) / 2, HEIGHT - 4, xlabel, "middle"),
      line(BOX.left, BOX.bottom, BOX.right, BOX.bottom, "grid"));
    let x = BOX.left;
    for (const [said, kind] of legend) {
      svg.append(kind === "measured" ? make("circle", { cx: x + 8, cy: 26, r: 4 })
        : make("path", { d: `M${x} 26h16`, class: kind }), text(x + 22, 30, said));
      x += 44 + 7 * said.length;
    }
    return { svg, layer };
  };

  // The error against the rank, on a logarithmic axis with a strip for rounding at its foot.
  const all = [...data.errors, ...data.bounds].flat(2).filter((value) => value >= data.rounding);
  const [bottom, top] = [Math.min(...all) / 1.5, Math.max(...all) * 1.5].map(Math.log10);
  const error = panel("Relative error", "rank R of each adapter",
    [["measured", "measured"], ["bound", "bound"], ["threshold", "threshold"]]);
  const cut = BOX.bottom - STRIP * (BOX.bottom - BOX.top);
  const last = data.ranks[data.ranks.length - 1];
  const rankX = scale(Math.min(...data.ranks, last - 1), last, BOX.left + 8, BOX.right - 8);
  const aboveY = scale(bottom, top, cut, BOX.top);
  const withinY = scale(Math.log10(LEAST), Math.log10(data.rounding), BOX.bottom, cut);
  const errorY = (value) => value >= data.rounding ? aboveY(Math.log10(value))
    : withinY(Math.log10(Math.max(value, LEAST)));
  error.svg.append(
    make("rect", { x: BOX.left, y: cut, width: BOX.right - BOX.left, height: BOX.bottom - cut, class: "strip" }),
    text(BOX.left - 5, (cut + BOX.bottom) / 2 + 4, "rounding", "end"));
  for (let power = Math.ceil(bottom); power <= top; power += 1) {
    error.svg.append(line(BOX.left, aboveY(power), BOX.right, aboveY(power), "grid"),
      text(BOX.left - 5, aboveY(power) + 4, String(Number(`1e${power}`)), "end"));
  }
  const every = Math.ceil(data.ranks.length / 9);
  data.ranks.filter((_, i) => i % every === 0).forEach((R) =>
    error.svg.append(text(rankX(R), BOX.bottom + 16, R, "middle")));
  error.svg.append(error.layer);

  // One output along a line of inputs.
  const [start, end] = [data.target[0], data.target[data.target.length - 2]];
  const output = panel("One output", "place on a line of inputs",
    [["target", "target"], ["frozen", "frozen"], ["adapted", "adapted"]]);
  const placeX = scale(start, end, BOX.left, BOX.right);
  const valueY = scale(...data.ends, BOX.bottom, BOX.top);
  for (const tick of steps(...data.ends, 5)) {
    output.svg.append(line(BOX.left, valueY(tick), BOX.right, valueY(tick), "grid"),
      text(BOX.left - 5, valueY(tick) + 4, tick, "end"));
  }
  for (const tick of steps(start, end, 5)) {
    output.svg.append(text(placeX(tick), BOX.bottom + 16, tick, "middle"));
  }
  output.svg.append(output.layer);
  const curve = (flat, kind) => path(flat.reduce((points, value, i) => i % 2
    ? points : [...points, [placeX(value), valueY(flat[i + 1])]], []), kind);

  const draw = () => {
    const [r, i, j] = [Number(rank.input.value), Number(depth.input.value), choice.selectedIndex];
    const [errors, bounds] = [data.errors[i][j], data.bounds[i][j]];
    const [R, threshold] = [data.ranks[r], data.thresholds[i][j]];
    const bounded = data.ranks.map((each, k) => [rankX(each), errorY(bounds[k])])
      .filter((_, k) => bounds[k] >= data.rounding);
    error.layer.replaceChildren(
      line(rankX(threshold), BOX.top, rankX(threshold), BOX.bottom, "threshold"),
      line(rankX(R), BOX.top, rankX(R), BOX.bottom, "chosen"),
      path(bounded, "bound"),
      ...data.ranks.map((each, k) => make("circle",
        { cx: rankX(each), cy: errorY(errors[k]), r: k === r ? 6 : 4, class: k === r ? "chosen" : "" })));
    output.layer.replaceChildren(curve(data.target, "target"), curve(data.frozen[i][j], "frozen"),
      curve(data.adapted[i][j][r], "adapted"));
    // The adapters of a block take as many singular values as their ranks add up to.
    const sigma = data.spectra[names[j]];
    const [step, tall] = [104 / sigma.length, 50 / Math.max(...sigma)];
    bars.replaceChildren(...sigma.map((s, k) => make("rect", {
      x: k * step + 1, width: Math.max(step - 2, 1), y: 51 - tall * s, height: tall * s,
      class: k < R * data.layers[i] ? "taken" : "left",
    })));
    const said = {
      rank: R, depth: data.depths[i], spectrum: names[j], threshold,
      error: Number(errors[r].toPrecision(2)), bound: Number(bounds[r].toPrecision(2)),
    };
    state.textContent = data.said[Number(errors[r] < data.rounding)]
      .replace(/\{(\w+)\}/g, (_, name) => said[name]);
  };
  for (const control of [rank.input, depth.input, choice]) control.addEventListener("input", draw);

  root.querySelector("img").remove();
  root.append(
    make("div", { class: "touch-controls" }, rank.field, depth.field,
      make("div", { class: "touch-choice" },
        make("label", {}, "Spectrum of E:", choice), bars)),
    state,
    make("div", { class: "touch-panels" }, error.svg, output.svg));
  draw();
})();
