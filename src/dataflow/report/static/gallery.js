"use strict";
// All entries, sorted and filtered by any column; or prompt by prompt.
{
  const { html } = DF;
  const { useEffect, useMemo, useRef, useState } = preactHooks;

  const SIZES = { small: 104, medium: 160, large: 240 };
  const GAP = 10;
  const isSystem = (column) => column.kind === "system" && column.name !== "prompt";
  const keyOf = (column) => `${column.kind}:${column.name}`;
  const listed = DF.summary.columns.filter((column) => !isSystem(column));
  const KINDS = { picture: "Picture", score: "Scores", row: "Row", system: "Text" };

  // Which entries --------------------------------------------------------------------------------------------------------

  /** Whether an entry passes a condition on a column. */
  function test(column, rule) {
    if (column.numbers) {
      const { numbers } = column;
      const low = rule.min ?? -Infinity;
      const high = rule.max ?? Infinity;
      return (at) => numbers[at] >= low && numbers[at] <= high;
    }
    const { codes, values } = column;
    const wanted = rule.in && new Set(rule.in);
    const text = rule.text && rule.text.toLocaleLowerCase();
    // Every different text is looked at once, not every entry.
    const passes = values.map((value) => (!wanted || wanted.has(value)) && (!text || value.toLocaleLowerCase().includes(text)));
    return (at) => codes[at] >= 0 && passes[codes[at]];
  }

  /** The places of entries by the order of a column; entries without a value come last either way. */
  function order(column, down, places) {
    const sign = down ? -1 : 1;
    let rank;
    if (column.numbers) rank = column.numbers;
    else {
      const collator = new Intl.Collator(undefined, { numeric: true });
      const sorted = column.values.map((_, code) => code).sort((a, b) => collator.compare(column.values[a], column.values[b]));
      const of = new Float64Array(sorted.length);
      sorted.forEach((code, number) => (of[code] = number));
      rank = Float64Array.from(column.codes, (code) => (code < 0 ? NaN : of[code]));
    }
    const known = places.filter((at) => !Number.isNaN(rank[at]));
    const missing = places.filter((at) => Number.isNaN(rank[at]));
    known.sort((a, b) => sign * (rank[a] - rank[b]) || a - b);
    const all = new Int32Array(places.length);
    all.set(known);
    all.set(missing, known.length);
    return all;
  }

  DF.select = async (state) => {
    const tests = [];
    for (const [key, rule] of Object.entries(state.filters || {})) {
      const column = await DF.column(key);
      tests.push(column ? test(column, rule) : () => false);
    }
    if (state.q) {
      const words = state.q.trim();
      const keys = ["system:prompt", "picture:instruction"];
      if (/^[0-9a-f]{6,}$/i.test(words)) keys.push("picture:id");
      const columns = (await Promise.all(keys.map(DF.column))).filter(Boolean);
      const each = columns.map((column) => test(column, { text: words }));
      tests.push((at) => each.some((one) => one(at)));
    }
    let places = new Int32Array(DF.summary.count).map((_, at) => at);
    if (tests.length) places = places.filter((at) => tests.every((one) => one(at)));
    const column = state.sort && (await DF.column(state.sort));
    return column ? order(column, state.down, places) : places;
  };

  function useSelection(state) {
    const [found, setFound] = useState(null);
    const key = JSON.stringify([state.filters, state.q, state.sort, state.down]);
    useEffect(() => {
      let here = true;
      DF.select(state).then((places) => here && setFound(places));
      return () => {
        here = false;
      };
    }, [key]);
    return found;
  }

  // Filters --------------------------------------------------------------------------------------------------------------

  function NumberFilter({ column, rule, onChange }) {
    const set = (end) => (event) => {
      const value = event.target.value === "" ? undefined : Number(event.target.value);
      const next = { ...rule, [end]: value };
      onChange(next.min === undefined && next.max === undefined ? null : next);
    };
    return html`<div class="range">
      ${["min", "max"].map(
        (end) => html`<label>${end === "min" ? "from" : "to"}
          <input type="number" step="any" value=${rule[end] ?? ""} placeholder=${DF.number(column[end])} onChange=${set(end)} /></label>`,
      )}
    </div>`;
  }

  function CategoryFilter({ column, rule, onChange }) {
    const chosen = new Set(rule.in || []);
    const toggle = (value) => () => {
      chosen.has(value) ? chosen.delete(value) : chosen.add(value);
      onChange(chosen.size ? { in: [...chosen] } : null);
    };
    const names = Object.entries(column.counts).sort((a, b) => b[1] - a[1]);
    return html`<ul class="choices">${names.map(
      ([value, count]) => html`<li><label><input type="checkbox" checked=${chosen.has(value)} onChange=${toggle(value)} />
        <span dir="auto">${keyOf(column) === "picture:state" ? DF.stateNames[value] : keyOf(column) === "picture:reason" ? DF.reason(value) : value}</span> <small class="quiet">${DF.count(count)}</small></label></li>`,
    )}</ul>`;
  }

  const TextFilter = ({ rule, onChange }) =>
    html`<label class="wide"><span class="unseen">contains</span><input type="search" placeholder="contains …" value=${rule.text || ""} onInput=${(event) => onChange(event.target.value ? { text: event.target.value } : null)} /></label>`;

  function Filters({ state, change }) {
    const [open, setOpen] = useState([]);
    const filters = state.filters || {};
    const always = ["picture:run", "picture:state", "picture:column"].filter((key) => {
      const column = DF.columnInfo(key);
      return column && (column.type !== "category" || Object.keys(column.counts).length > 1);
    });
    const shown = [...new Set([...always, ...Object.keys(filters), ...open])].filter(DF.columnInfo);
    const set = (key) => (rule) => {
      const next = { ...filters };
      if (rule) next[key] = rule;
      else delete next[key];
      if (!open.includes(key)) setOpen([...open, key]);
      change({ filters: next });
    };
    const rest = listed.filter((column) => !shown.includes(keyOf(column)));
    return html`<div class="filters">
      ${shown.map((key) => {
        const column = DF.columnInfo(key);
        const Kind = column.type === "number" ? NumberFilter : column.type === "category" && !(filters[key] || {}).text ? CategoryFilter : TextFilter;
        return html`<fieldset key=${key}>
          <legend>${column.name}${filters[key] && html` <button type="button" class="small" onClick=${() => set(key)(null)}>clear<span class="unseen"> the filter on ${column.name}</span></button>`}</legend>
          <${Kind} column=${column} rule=${filters[key] || {}} onChange=${set(key)} />
        </fieldset>`;
      })}
      <label class="wide">Filter by
        <select value="" onChange=${(event) => { setOpen([...open, event.target.value]); event.target.value = ""; }}>
          <option value="">another column …</option>
          <${ColumnOptions} columns=${rest} />
        </select>
      </label>
    </div>`;
  }

  const ColumnOptions = ({ columns }) =>
    Object.entries(KINDS).map(([kind, label]) => {
      const of = columns.filter((column) => column.kind === kind);
      return of.length > 0 && html`<optgroup label=${label}>${of.map((column) => html`<option value=${keyOf(column)}>${column.name}</option>`)}</optgroup>`;
    });

  // Showing them ---------------------------------------------------------------------------------------------------------

  /** Moves the focus among tiles with the arrow keys; one of them is in the order of the Tab key. */
  function useArrows(count, across, show, holder) {
    const [shown, setShown] = useState(0);
    const latest = useRef(0); // keys may come faster than the page is drawn
    const setAt = (place) => {
      latest.current = place;
      setShown(place);
    };
    const wanted = useRef(null);
    useEffect(() => {
      if (wanted.current === null || !holder.current) return;
      const tile = holder.current.querySelector(`[data-place="${wanted.current}"] .tile`);
      if (tile) {
        tile.focus({ preventScroll: true });
        wanted.current = null;
      }
    });
    const onKeyDown = (event) => {
      const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: across, ArrowUp: -across, PageDown: 4 * across, PageUp: -4 * across };
      const at = latest.current;
      let next;
      if (event.key in steps) next = at + steps[event.key];
      else if (event.key === "Home") next = 0;
      else if (event.key === "End") next = count - 1;
      else return;
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      if (next < 0 || next >= count) next = Math.min(count - 1, Math.max(0, Math.abs(steps[event.key]) === 1 ? next : at));
      wanted.current = next;
      setAt(next);
      show(next);
    };
    return { at: Math.min(shown, Math.max(0, count - 1)), setAt, onKeyDown };
  }

  function Grid({ places, size }) {
    const [holder, width] = DF.useWidth();
    const narrow = width && width < 460;
    const least = narrow ? Math.min(SIZES[size], (width - GAP) / 2) : SIZES[size];
    const across = Math.max(1, Math.floor((width + GAP) / (least + GAP)));
    const side = Math.floor((width - (across - 1) * GAP) / across);
    const height = side + 44 + GAP;
    const rows = width ? Math.ceil(places.length / across) : 0;
    const virtual = DF.useVirtual(rows, height, holder, `${across}`);
    const arrows = useArrows(places.length, across, (at) => virtual.scrollToIndex(Math.floor(at / across), { align: "auto" }), holder);
    const list = useMemo(() => Array.from(places), [places]);
    return html`<div ref=${holder} class="grid" role="group" aria-label=${`${DF.count(places.length)} entries; arrow keys move, Enter opens`} onKeyDown=${arrows.onKeyDown}>
      <div style=${{ height: `${virtual.getTotalSize()}px`, position: "relative" }}>
        ${width > 0 &&
        virtual.getVirtualItems().map(
          (row) => html`<div key=${row.key} class="line" style=${{ transform: `translateY(${row.start - virtual.options.scrollMargin}px)`, height: `${height - GAP}px`, gridTemplateColumns: `repeat(${across}, ${side}px)` }}>
            ${Array.from({ length: Math.min(across, places.length - row.index * across) }, (_, number) => {
              const place = row.index * across + number;
              return html`<div key=${places[place]} data-place=${place}>
                <${DF.Tile} at=${places[place]} list=${list} focusable=${place === arrows.at} onFocus=${() => arrows.setAt(place)} /></div>`;
            })}
          </div>`,
        )}
      </div>
    </div>`;
  }

  /** Entries put together by a column of numbers, in the order in which they come. */
  DF.grouped = (column, places) => {
    const groups = new Map();
    for (const at of places) {
      const key = column.numbers[at];
      if (!groups.has(key)) groups.set(key, []);
      groups.get(key).push(at);
    }
    return [...groups.values()];
  };

  const MOST_IN_GROUP = 48;

  function Group({ members, size }) {
    const [all, setAll] = useState(false);
    const tile = DF.useTile(members[0]);
    const prompt = DF.useDetail(members[0]);
    const shown = all ? members : members.slice(0, MOST_IN_GROUP);
    return html`<section class="group" aria-label=${tile ? tile[1] : ""}>
      <h3><${DF.Text} text=${prompt ? prompt.prompt || "no prompt" : tile ? tile[1] : "…"} /> <small class="quiet">${DF.count(members.length)}</small></h3>
      <div class="wrap" style=${{ "--side": `${SIZES[size]}px` }}>${shown.map((at) => html`<${DF.Tile} key=${at} at=${at} list=${members} />`)}</div>
      ${members.length > shown.length && html`<button type="button" onClick=${() => setAll(true)}>all ${DF.count(members.length)}</button>`}
    </section>`;
  }

  function Groups({ places, size }) {
    const holder = useRef(null);
    const [groups, setGroups] = useState([]);
    useEffect(() => {
      let here = true;
      DF.column("system:group").then((column) => here && column && setGroups(DF.grouped(column, places)));
      return () => {
        here = false;
      };
    }, [places]);
    const virtual = DF.useVirtual(groups.length, SIZES[size] + 110, holder, size);
    return html`<div ref=${holder} style=${{ height: `${virtual.getTotalSize()}px`, position: "relative" }}>
      ${virtual.getVirtualItems().map(
        (row) => groups[row.index] && html`<div key=${groups[row.index][0]} data-index=${row.index} class="line" ref=${(node) => virtual.measureElement(node)} style=${{ transform: `translateY(${row.start - virtual.options.scrollMargin}px)` }}>
          <${Group} members=${groups[row.index]} size=${size} />
        </div>`,
      )}
    </div>`;
  }

  const chipOf = (key, rule) => {
    const column = DF.columnInfo(key);
    const name = column ? column.name : key;
    if (rule.in) return `${name}: ${rule.in.map((value) => (key === "picture:state" ? DF.stateNames[value] : DF.reason(value))).join(", ")}`;
    if (rule.text) return `${name} contains “${rule.text}”`;
    return `${name} ${[rule.min !== undefined && `≥ ${rule.min}`, rule.max !== undefined && `≤ ${rule.max}`].filter(Boolean).join(", ")}`;
  };

  DF.Gallery = ({ state, change }) => {
    const places = useSelection(state);
    const [panel, setPanel] = useState(matchMedia("(min-width: 900px)").matches);
    const [query, setQuery] = useState(state.q || "");
    useEffect(() => setQuery(state.q || ""), [state.q]);
    useEffect(() => {
      if (query === (state.q || "")) return undefined;
      const timer = setTimeout(() => change({ q: query }), 250);
      return () => clearTimeout(timer);
    }, [query]);
    const filters = Object.entries(state.filters || {});
    const size = state.size || "medium";
    const by = state.by === "prompt";
    const without = (key) => {
      const next = { ...state.filters };
      delete next[key];
      change({ filters: next });
    };
    return html`<div class="gallery">
      <div class="bar" role="search">
        <input type="search" class="search" placeholder="Search prompts, instructions, ids" aria-label="Search prompts, instructions and ids" value=${query} onInput=${(event) => setQuery(event.target.value)} />
        <label>Sort by <select value=${state.sort || ""} onChange=${(event) => change({ sort: event.target.value })}>
          <option value="">order of the run</option><${ColumnOptions} columns=${listed} />
        </select></label>
        <button type="button" aria-pressed=${Boolean(state.down)} disabled=${!state.sort} title="turn the order around" onClick=${() => change({ down: !state.down })}>${state.down ? "↓ high first" : "↑ low first"}</button>
        <div class="switch" role="group" aria-label="Layout">
          <button type="button" aria-pressed=${!by} onClick=${() => change({ by: "" })}>all</button>
          <button type="button" aria-pressed=${by} onClick=${() => change({ by: "prompt" })}>by prompt</button>
        </div>
        <div class="switch sizes" role="group" aria-label="Size of pictures">
          ${Object.keys(SIZES).map((name) => html`<button type="button" aria-pressed=${size === name} aria-label=${name} onClick=${() => change({ size: name })}>${name[0].toUpperCase()}</button>`)}
        </div>
        <button type="button" aria-expanded=${panel} onClick=${() => setPanel(!panel)}>Filters${filters.length ? ` (${filters.length})` : ""}</button>
      </div>
      <div class=${panel ? "with-filters" : ""}>
        ${panel && html`<aside aria-label="Filters"><${Filters} state=${state} change=${change} /></aside>`}
        <div class="found">
          <p class="chips" role="status">
            <b>${places ? DF.count(places.length) : "…"}</b> of ${DF.plural(DF.summary.count, "entry", "entries")}
            ${filters.map(([key, rule]) => html`<button type="button" class="chip" onClick=${() => without(key)}><span dir="auto">${chipOf(key, rule)}</span> <span aria-hidden="true">×</span><span class="unseen">remove</span></button>`)}
            ${filters.length + (state.q ? 1 : 0) > 1 && html`<button type="button" class="small" onClick=${() => change({ filters: {}, q: "" })}>clear all</button>`}
          </p>
          ${places && !places.length && html`<p class="fine card">No entry is like that.</p>`}
          ${places && places.length > 0 && (by ? html`<${Groups} places=${places} size=${size} />` : html`<${Grid} places=${places} size=${size} />`)}
        </div>
      </div>
    </div>`;
  };
}
