"use strict";
// Without this script the page is complete: marks keep their titles, and an unfinished run is reloaded by its head.
(() => {
  const REACH = 24; // pixels from which a mark answers: a finger is wider than a mark

  const explore = (figure) => {
    const svg = figure.querySelector("svg"), tip = figure.querySelector(".tip");
    const marks = [...svg.querySelectorAll(".mark")];
    if (!marks.length) return;
    const place = (mark) => {
      const box = mark.getBoundingClientRect();
      return { x: box.left + box.width / 2, y: box.top + box.height / 2 };
    };
    let current = null;
    const hide = () => {
      if (current) current.classList.remove("on");
      current = null;
      tip.hidden = true;
    };
    const show = (mark) => {
      if (mark === current) return;
      hide();
      current = mark;
      mark.classList.add("on");
      tip.textContent = mark.getAttribute("aria-label");
      tip.hidden = false;
      const frame = figure.getBoundingClientRect(), at = place(mark);
      const left = Math.min(Math.max(at.x - frame.left - tip.offsetWidth / 2, 0), frame.width - tip.offsetWidth);
      const above = at.y - frame.top - tip.offsetHeight - 14;
      tip.style.left = `${left}px`;
      tip.style.top = `${above < 0 ? at.y - frame.top + 14 : above}px`;
    };
    const nearest = (event) => {
      let best = null, distance = REACH;
      for (const mark of marks) {
        const at = place(mark), away = Math.hypot(at.x - event.clientX, at.y - event.clientY);
        if (away < distance) [best, distance] = [mark, away];
      }
      return best;
    };
    // The browser's own hover text would cover ours; the name stays for screen readers.
    for (const mark of marks) mark.querySelector("title")?.remove();
    // One stop for the tab key; arrows go from left to right.
    const ordered = [...marks].sort((a, b) => place(a).x - place(b).x);
    ordered.forEach((mark, index) => mark.setAttribute("tabindex", index ? "-1" : "0"));
    ordered.forEach((mark, index) => {
      mark.addEventListener("focus", () => show(mark));
      mark.addEventListener("blur", hide);
      mark.addEventListener("keydown", (event) => {
        const steps = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 };
        const next = { Home: 0, End: ordered.length - 1 }[event.key] ?? (index + (steps[event.key] ?? 0));
        if (event.key === "Escape") hide();
        if (next === index || !ordered[next]) return;
        event.preventDefault();
        mark.setAttribute("tabindex", "-1");
        ordered[next].setAttribute("tabindex", "0");
        ordered[next].focus();
      });
    });
    const point = (event) => {
      const mark = nearest(event);
      if (mark) show(mark);
      else if (document.activeElement !== current) hide();
    };
    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerdown", point);
    svg.addEventListener("pointerleave", (event) => {
      if (event.pointerType === "mouse" && document.activeElement !== current) hide();
    });
    document.addEventListener("pointerdown", (event) => {
      if (!svg.contains(event.target)) hide();
    });
  };
  document.querySelectorAll("figure.interactive").forEach(explore);

  // On paper everything that is folded is opened, but for what is marked as too long.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details.paper:not([open])")];
    opened.forEach((part) => { part.open = true; });
  });
  addEventListener("afterprint", () => opened.forEach((part) => { part.open = false; }));

  // News of an unfinished run, unless somebody is reading a mark, has opened a part, or has selected text.
  const seconds = Number(document.documentElement.dataset.refresh);
  if (seconds > 0) {
    const folded = new Set(document.querySelectorAll("details[open]"));
    const busy = () => document.hidden || document.querySelector(".tip:not([hidden])") || String(getSelection())
      || [...document.querySelectorAll("details[open]")].some((part) => !folded.has(part));
    setInterval(() => { if (!busy()) location.reload(); }, seconds * 1000);
  }
})();
