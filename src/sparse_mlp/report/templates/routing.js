"use strict";
// Draws the routing of the page's images from the JSON beside it. A layer's cells are its patches, row by row.
(() => {
  const data = JSON.parse(document.getElementById("routing-data").textContent);
  const root = document.getElementById("explorer");
  const at = (name) => root.querySelector(`[data-${name}]`);
  const ALL = -1;
  const state = { image: 0, layer: Math.max(0, data.patches.length - 1), expert: ALL, x: 0.5, y: 0.5, held: false };

  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  for (const layer of data.patches) {
    layer.values = bytes(layer.values);
    layer.chosen = layer.chosen && new Int16Array(bytes(layer.chosen).buffer);
    layer.cells = layer.grid[0] * layer.grid[1];
  }
  for (const layer of data.channels) layer.filters = new Int8Array(bytes(layer.filters).buffer);

  function element(tag, className = "", text = "") {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text) made.textContent = text;
    return made;
  }

  // What the layers do

  function value(layer, cell, expert) {
    const level = layer.values[(state.image * layer.cells + cell) * layer.experts + expert];
    return layer.low + ((layer.high - layer.low) * level) / 255;
  }

  function chosen(layer, cell) {
    if (!layer.chosen) return [];
    const start = (state.image * layer.cells + cell) * layer.topK;
    return [...layer.chosen.subarray(start, start + layer.topK)].filter((expert) => expert >= 0);
  }

  // How strongly each expert stands out in each cell, 0 to 1: its score, or how far its share lies above its mean.
  function strengths(layer) {
    const all = new Float32Array(layer.cells * layer.experts);
    for (let expert = 0; expert < layer.experts; expert++) {
      let mean = 0;
      if (!layer.exact) {
        for (let cell = 0; cell < layer.cells; cell++) mean += value(layer, cell, expert) / layer.cells;
      }
      for (let cell = 0; cell < layer.cells; cell++) {
        all[cell * layer.experts + expert] = (value(layer, cell, expert) - mean) / (layer.exact ? 1 : layer.full);
      }
    }
    return all;
  }

  function cellAt(layer) {
    const [rows, columns] = layer.grid;
    const row = Math.min(rows - 1, Math.floor(state.y * rows));
    return row * columns + Math.min(columns - 1, Math.floor(state.x * columns));
  }

  function strongest(layer, all, cell) {
    const went = chosen(layer, cell);
    const among = went.length ? went : layer.exact ? [] : [...Array(layer.experts).keys()];
    return among.reduce((best, e) => (all[cell * layer.experts + e] > all[cell * layer.experts + best] ? e : best), among[0]);
  }

  // Choices: buttons of which one is pressed, with one stop of the Tab key and arrow keys within

  function choices(box, buttons, pick) {
    const choose = (number, focus) => {
      buttons.forEach((button, i) => {
        button.setAttribute("aria-checked", i === number);
        button.tabIndex = i === number ? 0 : -1;
      });
      if (focus) buttons[number].focus();
      pick(number);
    };
    buttons.forEach((button, i) => {
      button.type = "button";
      button.setAttribute("role", "radio");
      button.addEventListener("click", () => choose(i, false));
      button.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
        if (!step) return;
        event.preventDefault();
        choose((i + step + buttons.length) % buttons.length, true);
      });
    });
    box.replaceChildren(...buttons);
    return choose;
  }

  // The picture

  const picture = element("img");
  function drawPicture() {
    const image = data.images[state.image], layer = data.patches[state.layer];
    const stage = at("stage"), canvas = at("canvas"), shown = at("overlay").checked;
    stage.style.aspectRatio = image.ratio;
    stage.classList.toggle("pale", shown);
    picture.src = image.uri;
    picture.classList.toggle("small", image.small);
    picture.alt = image.name;
    at("about").textContent = [image.name, image.answer].filter(Boolean).join(": ");
    const scale = window.devicePixelRatio || 1;
    canvas.width = Math.round(stage.clientWidth * scale);
    canvas.height = Math.round(stage.clientHeight * scale);
    const pen = canvas.getContext("2d");
    const all = strengths(layer), [rows, columns] = layer.grid;
    const largest = layer.exact ? Math.max(...all) : 1;
    for (let cell = 0; shown && cell < layer.cells; cell++) {
      const expert = state.expert === ALL ? strongest(layer, all, cell) : state.expert;
      if (expert === undefined) continue; // the patch was dropped
      const area = Math.min(1, Math.max(0, all[cell * layer.experts + expert] / largest));
      const went = !layer.exact || chosen(layer, cell).includes(expert);
      square(pen, canvas.width / columns, canvas.height / rows, cell, columns, area, layer.colours[expert], went);
    }
    const cursor = at("cursor"), cell = cellAt(layer);
    cursor.style.cssText =
      `left:${(100 * (cell % columns)) / columns}%;top:${(100 * Math.floor(cell / columns)) / rows}%;` +
      `width:${100 / columns}%;height:${100 / rows}%`;
    cursor.classList.toggle("held", state.held);
  }

  function square(pen, width, height, cell, columns, area, colour, filled) {
    const side = 0.68 * Math.sqrt(area), w = side * width, h = side * height;
    const left = (cell % columns + 0.5) * width - w / 2, top = (Math.floor(cell / columns) + 0.5) * height - h / 2;
    pen.fillStyle = pen.strokeStyle = colour;
    pen.lineWidth = Math.max(1, 0.04 * width);
    if (filled) pen.fillRect(left, top, w, h);
    else if (w > 4) pen.strokeRect(left + pen.lineWidth / 2, top + pen.lineWidth / 2, w - pen.lineWidth, h - pen.lineWidth);
  }

  // The patch in every layer

  const rows = [];
  function buildGates() {
    for (const [number, layer] of data.patches.entries()) {
      const row = element("button", layer.exact ? "gate" : "gate signed");
      row.type = "button";
      row.title = `show ${layer.name}`;
      row.addEventListener("click", () => setLayer(number));
      const bars = element("span", "bars");
      for (const colour of layer.colours) {
        const slot = element("span"), bar = element("i");
        bar.style.background = colour;
        slot.append(bar);
        bars.append(slot);
      }
      const text = element("span", "says");
      row.append(element("span", "name", layer.name), bars, text);
      at("gates").append(row);
      rows.push({ row, text, bars: [...bars.querySelectorAll("i")] });
    }
  }

  function drawGates() {
    const [height, width] = data.patches[state.layer].grid, here = cellAt(data.patches[state.layer]);
    at("where").textContent =
      `Patch in row ${Math.floor(here / width) + 1} of ${height}, column ${(here % width) + 1} of ${width}` +
      (state.held ? ", held" : "");
    data.patches.forEach((layer, number) => {
      const { row, text, bars } = rows[number], cell = cellAt(layer), went = chosen(layer, cell);
      const all = strengths(layer), own = all.subarray(cell * layer.experts, (cell + 1) * layer.experts);
      row.classList.toggle("current", number === state.layer);
      bars.forEach((bar, expert) => {
        const size = Math.min(1, Math.abs(own[expert]));
        bar.style.height = `${(layer.exact ? 100 : 50) * size}%`;
        bar.className = own[expert] < 0 ? "below" : "";
        bar.classList.toggle("other", layer.exact && !went.includes(expert));
        bar.parentElement.title = `expert ${expert}: ${reading(layer, own[expert])}`;
      });
      const best = layer.exact ? went : [strongest(layer, all, cell)];
      text.textContent = best.map((expert) => `expert ${expert} ${reading(layer, own[expert])}`).join(", ") || "dropped";
    });
  }

  function reading(layer, strength) {
    if (layer.exact) return strength.toFixed(2);
    const points = 100 * strength * layer.full;
    return `${points < 0 ? "\u2212" : "+"}${Math.abs(points).toFixed(1)} points`;
  }

  // Vocabularies

  function crops(layer, expert, most) {
    const list = element("ul", "crops");
    list.style.setProperty("--sheet", `url(${layer.words.sheet})`);
    list.style.setProperty("--columns", layer.words.count);
    layer.words.items[expert].slice(0, most).forEach(([index, label, patch, liking], rank) => {
      const item = element("li"), crop = element("span", "crop");
      const name = layer.words.labels[label], column = patch % layer.grid[1], row = Math.floor(patch / layer.grid[1]);
      const unit = layer.exact ? liking.toFixed(2) : `+${(100 * liking).toFixed(1)} points`;
      crop.style.setProperty("--column", rank);
      crop.style.setProperty("--row", expert);
      item.title = `${name}, image ${index}, row ${row + 1}, column ${column + 1}: ${unit}`;
      item.append(crop, element("small", "", name));
      list.append(item);
    });
    return list;
  }

  function drawWords() {
    const layer = data.patches[state.layer], part = at("words-part");
    part.hidden = !layer.words;
    if (!layer.words) return;
    const one = state.expert !== ALL;
    at("words-title").textContent = one ? `What expert ${state.expert} likes most` : "What the experts like most";
    const [some, total] = [data.looked, data.total].map((number) => number.toLocaleString("en"));
    const looked = data.looked < data.total ? `${some} of ${total}` : `all ${total}`;
    const measure = layer.exact
      ? "those that went to it with the highest score"
      : "those where its share lies furthest above the mean share of the same place";
    at("words-lead").textContent =
      `The vocabulary of ${layer.name}: patches of ${looked} images, ${measure}, at most one an image. ` +
      "The patch is in the middle of its neighbours.";
    if (!one && layer.experts > 16) {
      at("words").replaceChildren(element("p", "where", "Choose an expert above."));
      return;
    }
    const shown = one ? [state.expert] : [...Array(layer.experts).keys()];
    at("words").replaceChildren(...shown.map((expert) => {
      const line = element("div", one ? "line one" : "line");
      if (!one) line.append(swatch(layer, expert));
      if (layer.words.items[expert].length) line.append(crops(layer, expert, one ? Infinity : 16));
      else line.append(element("p", "where", "No patch went to this expert."));
      return line;
    }));
  }

  function swatch(layer, expert) {
    const name = element("span", "swatch", `expert ${expert}`), box = element("i");
    box.style.background = layer.colours[expert];
    name.prepend(box);
    return name;
  }

  // Spatial filters

  function drawFilters(layer) {
    const [height, width] = layer.grid, size = height * width;
    at("filters").replaceChildren(...layer.colours.map((_, expert) => {
      const line = element("div", "line"), box = element("div", "filters"), name = swatch(layer, expert);
      name.append(element("small", "", `${(100 * layer.load[expert]).toFixed(1)} % of channels`));
      for (let unit = 0; unit < layer.count; unit++) {
        const canvas = element("canvas");
        canvas.width = width;
        canvas.height = height;
        const pen = canvas.getContext("2d"), pixels = pen.createImageData(width, height);
        for (let cell = 0; cell < size; cell++) {
          const weight = layer.filters[(expert * layer.count + unit) * size + cell] / 127;
          const full = weight > 0 ? [196, 98, 26] : [84, 62, 150], share = Math.abs(weight);
          for (let c = 0; c < 3; c++) pixels.data[4 * cell + c] = 245 + share * (full[c] - 245);
          pixels.data[4 * cell + 3] = 255;
        }
        pen.putImageData(pixels, 0, 0);
        box.append(canvas);
      }
      box.setAttribute("role", "img");
      box.setAttribute("aria-label", `spatial filters of expert ${expert} in ${layer.name}`);
      line.append(name, box);
      return line;
    }));
  }

  // Changes

  function draw() {
    drawPicture();
    drawGates();
  }

  function setLayer(number) {
    state.layer = number;
    at("layer").selectedIndex = number;
    const layer = data.patches[number], all = element("button", "", "all");
    const chips = layer.colours.map((_, expert) => {
      const chip = element("button", "", String(expert)), box = element("i");
      box.style.background = layer.colours[expert];
      chip.prepend(box);
      chip.setAttribute("aria-label", `expert ${expert}`);
      return chip;
    });
    const choose = choices(at("experts"), [all, ...chips], (i) => {
      state.expert = i - 1;
      draw();
      drawWords();
    });
    choose(state.expert < layer.experts ? state.expert + 1 : 0, false);
  }

  function point(event) {
    const box = at("stage").getBoundingClientRect();
    const inside = (place) => Math.min(0.9999, Math.max(0, place));
    state.x = inside((event.clientX - box.left) / box.width);
    state.y = inside((event.clientY - box.top) / box.height);
  }

  function buildStage() {
    const stage = at("stage");
    stage.prepend(picture);
    stage.addEventListener("pointermove", (event) => {
      if (state.held) return;
      point(event);
      draw();
    });
    stage.addEventListener("click", (event) => {
      const layer = data.patches[state.layer], before = cellAt(layer), held = state.held;
      point(event);
      state.held = !(held && cellAt(layer) === before);
      draw();
    });
    stage.addEventListener("keydown", (event) => {
      const step = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
      if (step) {
        const [height, width] = data.patches[state.layer].grid, cell = cellAt(data.patches[state.layer]);
        const column = Math.min(width - 1, Math.max(0, (cell % width) + step[0]));
        const row = Math.min(height - 1, Math.max(0, Math.floor(cell / width) + step[1]));
        state.x = (column + 0.5) / width;
        state.y = (row + 0.5) / height;
      } else if (event.key === "Enter" || event.key === " ") state.held = !state.held;
      else if (event.key === "Escape") state.held = false;
      else return;
      event.preventDefault();
      draw();
    });
    new ResizeObserver(draw).observe(stage);
  }

  function select(box, layers, pick) {
    box.append(...layers.map((layer) => element("option", "", layer.name)));
    box.addEventListener("change", () => pick(box.selectedIndex));
  }

  root.hidden = false;
  document.addEventListener("DOMContentLoaded", () => {
    for (const details of document.querySelectorAll("details[data-static]")) details.open = false;
  });
  if (data.patches.length) {
    buildGates();
    select(at("layer"), data.patches, setLayer);
    at("overlay").addEventListener("change", draw);
    setLayer(state.layer);
    const thumbs = data.images.map((image) => {
      const thumb = element("button"), small = element("img");
      small.src = image.uri;
      small.alt = image.name;
      small.classList.toggle("small", image.small);
      thumb.title = image.name;
      thumb.append(small);
      return thumb;
    });
    const choose = choices(at("images"), thumbs, (i) => {
      state.image = i;
      draw();
    });
    choose(0, false);
    buildStage();
  }
  if (data.channels.length) {
    select(at("filter-layer"), data.channels, (number) => drawFilters(data.channels[number]));
    at("filter-layer").selectedIndex = data.channels.length - 1;
    drawFilters(data.channels[data.channels.length - 1]);
  }
})();
