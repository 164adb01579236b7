"use strict";
// The frame: which view, which entry is open. Both stand in the address, so that "back" works and a view can be sent.
{
  const { html } = DF;
  const { useEffect, useState } = preactHooks;
  const { summary } = DF;

  const problems = summary.problems.reduce((total, each) => total + each.count, 0);
  const VIEWS = [
    ["overview", "Overview", () => html`<${DF.Overview} />`],
    ["gallery", "Gallery", (props) => html`<${DF.Gallery} ...${props} />`],
    ["problems", `Problems${problems ? ` ${DF.count(problems)}` : ""}`, () => html`<${DF.Problems} />`],
    ["compare", summary.runs.length > 1 ? "Compare" : "Rate", (props) => html`<${DF.Compare} ...${props} />`],
  ];

  function parse() {
    const [view, query = ""] = location.hash.slice(1).split("?");
    const params = new URLSearchParams(query);
    const state = { view: VIEWS.some(([name]) => name === view) ? view : "overview" };
    for (const name of ["q", "sort", "by", "size"]) if (params.get(name)) state[name] = params.get(name);
    if (params.has("down")) state.down = true;
    if (/^\d+$/.test(params.get("entry") || "") && Number(params.get("entry")) < summary.count) state.entry = Number(params.get("entry"));
    try {
      const filters = JSON.parse(params.get("filters") || "{}");
      state.filters = filters && typeof filters === "object" && !Array.isArray(filters) ? filters : {};
    } catch {
      state.filters = {};
    }
    return state;
  }

  DF.link = (view, state = {}) => {
    const params = new URLSearchParams();
    for (const name of ["q", "sort", "by", "size"]) if (state[name]) params.set(name, state[name]);
    if (state.down) params.set("down", "1");
    if (state.filters && Object.keys(state.filters).length) params.set("filters", JSON.stringify(state.filters));
    if (state.entry !== undefined) params.set("entry", state.entry);
    const query = params.toString();
    return `#${view}${query ? `?${query}` : ""}`;
  };
  DF.go = (view, state, instead) => {
    const link = DF.link(view, state);
    if (instead) location.replace(link);
    else location.hash = link;
  };
  DF.open = (at, list) => {
    DF.list = list;
    const state = parse();
    DF.go(state.view, { ...state, entry: at }, state.entry !== undefined);
  };

  // An entry that was opened by its address is one of all.
  DF.placeOf = (at) => (DF.list ? DF.list.indexOf(at) : at);
  DF.listLength = () => (DF.list ? DF.list.length : summary.count);

  // Light or dark as the system says, unless a person said otherwise.
  const listeners = new Set();
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const theme = () => document.documentElement.dataset.theme || (dark.matches ? "dark" : "light");
  dark.addEventListener("change", () => listeners.forEach((tell) => tell()));
  DF.useTheme = () => {
    const [name, setName] = useState(theme());
    useEffect(() => {
      const tell = () => setName(theme());
      listeners.add(tell);
      return () => listeners.delete(tell);
    }, []);
    return name;
  };
  const turn = () => {
    document.documentElement.dataset.theme = theme() === "dark" ? "light" : "dark";
    listeners.forEach((tell) => tell());
  };

  function App() {
    const [state, setState] = useState(parse);
    const name = DF.useTheme();
    useEffect(() => {
      const onHash = () => setState((before) => {
        const next = parse();
        if (next.view !== before.view) window.scrollTo(0, 0);
        return next;
      });
      window.addEventListener("hashchange", onHash);
      return () => window.removeEventListener("hashchange", onHash);
    }, []);
    // Keys may come faster than the page is drawn: what counts is the address, not what is shown.
    const change = (part) => {
      const now = parse();
      DF.go(now.view, { ...now, ...part }, true);
    };
    const close = () => {
      const at = parse().entry;
      change({ entry: undefined });
      // Back to where one came from, or to the entry that one has moved to.
      requestAnimationFrame(() => {
        const tile = document.querySelector(`main .tile[data-at="${at}"]`);
        if (tile) tile.focus();
      });
    };
    const move = (step) => {
      const place = DF.placeOf(parse().entry) + step;
      const next = DF.list ? DF.list[place] : place >= 0 && place < summary.count ? place : undefined;
      if (next !== undefined) change({ entry: next });
    };
    const [, , View] = VIEWS.find(([each]) => each === state.view);
    return html`
      <a class="skip" href="#main" onClick=${(event) => { event.preventDefault(); document.getElementById("main").focus(); }}>To the content</a>
      <header class="top">
        <h1 title=${summary.title}><${DF.Text} text=${summary.title} /></h1>
        <nav aria-label="Views">${VIEWS.map(([each, label]) => html`<a href=${`#${each}`} aria-current=${state.view === each ? "page" : undefined}>${label}</a>`)}</nav>
        <button type="button" class="theme" aria-label=${`change to ${name === "dark" ? "light" : "dark"} colours`} onClick=${turn}>${name === "dark" ? "☀" : "☾"}</button>
      </header>
      <main id="main" tabindex="-1"><${View} state=${state} change=${change} /></main>
      <footer class="quiet">dataflow ${summary.version} · ${DF.plural(summary.pictures, "picture")} · pictures are linked from where they lie: keep the report where it is, or move it together with its folder</footer>
      ${state.entry !== undefined && html`<${DF.Detail} at=${state.entry} close=${close} move=${move} />`}
    `;
  }

  const place = document.getElementById("app");
  place.textContent = "";
  preact.render(html`<${App} />`, place);
}
