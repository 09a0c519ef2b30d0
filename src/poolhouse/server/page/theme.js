// Before the first paint, so that a chosen theme does not flash.
document.documentElement.dataset.theme = (() => {
  try { return localStorage.getItem("poolhouse-theme") || "auto"; } catch { return "auto"; }
})();
