"use strict";
(function () {
  function fmt(v) {
    if (v === 0) return "0";
    var a = Math.abs(v);
    if (a >= 1e7 || a < 1e-4) return v.toExponential(2);
    if (a >= 1000) return Math.round(v).toLocaleString("en-US");
    return String(Number(v.toPrecision(4)));
  }
  function nearest(xs, x) {
    var lo = 0, hi = xs.length - 1;
    while (hi - lo > 1) { var m = (lo + hi) >> 1; if (xs[m] < x) lo = m; else hi = m; }
    return Math.abs(xs[lo] - x) <= Math.abs(xs[hi] - x) ? lo : hi;
  }
  function make(tag, cls, parent) {
    var e = document.createElement(tag);
    e.className = cls;
    parent.appendChild(e);
    return e;
  }
  document.querySelectorAll("[data-chart]").forEach(function (figure) {
    var area = figure.querySelector(".area"), d = JSON.parse(figure.dataset.chart), shown = [];
    function clear() { shown.forEach(function (e) { e.remove(); }); shown = []; }
    function height(y) {
      return d.log ? Math.log(Math.max(y, d.yl) / d.yl) / Math.log(d.yh / d.yl) : (y - d.yl) / (d.yh - d.yl);
    }
    area.addEventListener("pointerleave", clear);
    area.addEventListener("pointermove", show);
    area.addEventListener("pointerdown", show);
    function show(event) {
      var box = area.getBoundingClientRect(), at = (event.clientX - box.left) / box.width;
      clear();
      if (at < 0 || at > 1) return;
      var x = d.lo + at * (d.hi - d.lo), rows = [], snapped = null;
      d.s.forEach(function (s) {
        if (!s.x.length) return;
        var i = nearest(s.x, x);
        // a line that is near zero here, or does not reach here, would only fill the tooltip
        if (d.least && (s.y[i] < d.least || Math.abs(s.x[i] - x) > (d.hi - d.lo) / 50)) return;
        if (snapped === null || Math.abs(s.x[i] - x) < Math.abs(snapped - x)) snapped = s.x[i];
        rows.push({ s: s, i: i });
      });
      if (snapped === null) return;
      var left = 100 * (snapped - d.lo) / (d.hi - d.lo), guide = make("div", "guide", area), tip = make("div", "tip", area);
      guide.style.left = left + "%";
      shown.push(guide, tip);
      var head = make("b", "", tip);
      head.textContent = d.w ? fmt(snapped - d.w / 2) + " to " + fmt(snapped + d.w / 2) + " s" : d.x + " " + fmt(snapped);
      rows.forEach(function (r) {
        var y = r.s.y[r.i], line = make("div", "s" + r.s.c % 6, tip);
        make("i", "", line);
        var where = r.s.x[r.i] === snapped ? "" : " (at " + fmt(r.s.x[r.i]) + ")";
        line.append(r.s.name + " " + (y === null ? "not finite" : fmt(y) + r.s.u) + where);
        if (y === null || d.w) return;
        var spot = make("div", "spot s" + r.s.c % 6, area);
        spot.style.left = 100 * (r.s.x[r.i] - d.lo) / (d.hi - d.lo) + "%";
        spot.style.bottom = 100 * height(y) + "%";
        spot.style.margin = "0 0 -4.5px -4.5px";
        shown.push(spot);
      });
      if (left > 55) tip.style.right = 100 - left + 2 + "%"; else tip.style.left = left + 2 + "%";
    }
  });
  document.querySelectorAll("button[data-copy]").forEach(function (button) {
    button.addEventListener("click", function () {
      var code = button.parentNode.querySelector("code"), range = document.createRange();
      range.selectNodeContents(code);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      if (navigator.clipboard) navigator.clipboard.writeText(code.textContent).catch(function () {});
      else document.execCommand("copy");
      button.textContent = "Copied";
    });
  });
  var theme = document.getElementById("theme"), root = document.documentElement;
  theme.addEventListener("click", function () {
    var dark = root.classList.contains("dark") ||
      (!root.classList.contains("light") && matchMedia("(prefers-color-scheme: dark)").matches);
    root.classList.remove("dark", "light");
    root.classList.add(dark ? "light" : "dark");
  });
  document.body.dataset.ready = "1";
})();
