"use strict";
// What a page can do beside being read: show one version of a figure at a time, and say the numbers
// under the cursor. Without it everything is visible.

// One of the versions of a figure, chosen by a button.
for (const figure of document.querySelectorAll("figure")) {
  const choice = figure.querySelector(".switch");
  if (!choice) continue;
  const versions = [...figure.querySelectorAll(".version")];
  const buttons = [...choice.querySelectorAll("button")];
  const show = (chosen) => {
    versions.forEach((version, i) => { version.hidden = i !== chosen; });
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(i === chosen)));
  };
  buttons.forEach((button, i) => button.addEventListener("click", () => show(i)));
  show(versions.findIndex((version) => "shown" in version.dataset));
  choice.hidden = false;
}

// The reading nearest to the cursor, or one after the other with the arrow keys.
for (const sheet of document.querySelectorAll(".sheet")) {
  const readings = JSON.parse(sheet.dataset.readings);
  if (readings.length === 0) continue;
  const mark = document.createElement("span");
  const tip = document.createElement("output");
  mark.className = "mark";
  tip.className = "tip";
  sheet.append(mark, tip);
  const inOrder = readings.map((_, i) => i).sort((i, j) =>
    readings[i][0] - readings[j][0] || readings[i][1] - readings[j][1]);
  let place = -1;

  const hide = () => { mark.hidden = tip.hidden = true; };
  const show = (i) => {
    const [x, y, text] = readings[i];
    mark.hidden = tip.hidden = false;
    mark.style.left = `${100 * x}%`;
    mark.style.top = `${100 * y}%`;
    tip.textContent = text;
    // On the side where there is more room, and never outside of the figure.
    const room = sheet.clientWidth - tip.offsetWidth;
    const wanted = x * sheet.clientWidth - (x > 0.5 ? tip.offsetWidth + 12 : -12);
    tip.style.left = `${Math.max(0, Math.min(room, wanted))}px`;
    const above = y * sheet.clientHeight - tip.offsetHeight - 12;
    tip.style.top = `${above > 0 ? above : y * sheet.clientHeight + 12}px`;
  };

  sheet.addEventListener("pointermove", (event) => {
    const box = sheet.getBoundingClientRect();
    const x = event.clientX - box.left, y = event.clientY - box.top;
    // Along the axis first: a stem is pointed at by its foot, too.
    const distance = ([a, b]) => (a * box.width - x) ** 2 + (0.2 * (b * box.height - y)) ** 2;
    let nearest = 0;
    readings.forEach((reading, i) => {
      if (distance(reading) < distance(readings[nearest])) nearest = i;
    });
    place = inOrder.indexOf(nearest);
    show(nearest);
  });
  sheet.addEventListener("pointerleave", hide);
  sheet.addEventListener("blur", hide);
  sheet.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") hide();
    if (!step) return;
    event.preventDefault();
    place = (place + step + (place < 0 && step < 0 ? 1 : 0) + inOrder.length) % inOrder.length;
    show(inOrder[place]);
  });
  sheet.tabIndex = 0;
  sheet.setAttribute("role", "group");
  sheet.setAttribute("aria-label", "Figure; the arrow keys read its numbers");
  hide();
}
