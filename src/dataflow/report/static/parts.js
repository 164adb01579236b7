"use strict";
// What several views are made of.
{
  const { html } = DF;
  const { useEffect, useLayoutEffect, useMemo, useRef, useState } = preactHooks;
  const { Virtualizer, windowScroll, observeWindowRect, observeWindowOffset, measureElement } =
    dataflowReport.modules.get("index.cjs");

  /** The rows in sight of a list as long as it likes; rows are measured as they come. */
  DF.useVirtual = (count, estimate, holder, key) => {
    const [, again] = useState(0);
    const [margin, setMargin] = useState(0);
    useLayoutEffect(() => {
      if (!holder.current) return undefined;
      const place = () => holder.current && setMargin(holder.current.getBoundingClientRect().top + window.scrollY);
      place();
      const observer = new ResizeObserver(place);
      observer.observe(document.body);
      return () => observer.disconnect();
    }, [key]);
    const options = {
      count,
      estimateSize: () => estimate,
      overscan: 3,
      scrollMargin: margin,
      getScrollElement: () => window,
      scrollToFn: windowScroll,
      observeElementRect: observeWindowRect,
      observeElementOffset: observeWindowOffset,
      measureElement,
      initialOffset: () => window.scrollY,
      onChange: () => again((number) => number + 1),
    };
    const virtual = useMemo(() => new Virtualizer(options), []);
    virtual.setOptions({ ...virtual.options, ...options });
    useLayoutEffect(() => virtual._didMount(), []);
    useLayoutEffect(() => virtual._willUpdate());
    useLayoutEffect(() => virtual.measure(), [estimate, key]);
    return virtual;
  };

  /** The width of an element, as it changes. */
  DF.useWidth = () => {
    const holder = useRef(null);
    const [width, setWidth] = useState(0);
    useLayoutEffect(() => {
      if (!holder.current) return undefined;
      const observer = new ResizeObserver(() => holder.current && setWidth(holder.current.clientWidth));
      setWidth(holder.current.clientWidth);
      observer.observe(holder.current);
      return () => observer.disconnect();
    }, []);
    return [holder, width];
  };

  DF.State = ({ state }) => html`<span class=${`state ${state}`}>${DF.stateNames[state] || DF.plain(state)}</span>`;

  /** The small picture of an entry, or the reason why there is none. */
  DF.Thumb = ({ at, label }) => {
    const webp = DF.useThumb(at);
    const tile = DF.useTile(at);
    if (webp) return html`<img src=${`data:image/webp;base64,${webp}`} alt=${label ?? (tile ? tile[1] : "")} />`;
    if (webp === undefined || tile === undefined) return html`<span class="blank" aria-busy="true"></span>`;
    const state = tile && DF.states[tile[0]];
    return html`<span class=${`none ${state}`}>
      <b>${tile && tile[4] ? DF.reason(tile[4]) : "no picture"}</b>
      <small dir="auto">${tile ? tile[5] : ""}</small>
    </span>`;
  };

  /** A picture in a gallery: a button that opens everything about it. */
  DF.Tile = ({ at, list, caption = true, focusable = true, onFocus, badge = true }) => {
    const tile = DF.useTile(at);
    const state = tile ? DF.states[tile[0]] : "";
    const words = tile ? `${tile[1] || "no prompt"}, ${DF.stateNames[state]}${tile[4] ? `: ${DF.reason(tile[4])}` : ""}` : "";
    return html`<button
      type="button"
      class=${`tile ${state}`}
      data-at=${at}
      tabindex=${focusable ? 0 : -1}
      aria-label=${words}
      onFocus=${onFocus}
      onClick=${() => DF.open(at, list)}
    >
      <span class="picture"><${DF.Thumb} at=${at} label="" /></span>
      ${badge && state && state !== "kept" && html`<span class="badge" aria-hidden="true"><${DF.State} state=${state} /></span>`}
      ${caption &&
      html`<span class="caption" aria-hidden="true">
        <span dir="auto">${tile ? tile[1] || "no prompt" : ""}</span>
      </span>`}
    </button>`;
  };

  DF.Copy = ({ text, label = "Copy" }) => {
    const [done, setDone] = useState(false);
    useEffect(() => {
      if (!done) return undefined;
      const timer = setTimeout(() => setDone(false), 1500);
      return () => clearTimeout(timer);
    }, [done]);
    const copy = async () => {
      try {
        await navigator.clipboard.writeText(text);
      } catch {
        // A page from disk may be denied the clipboard: the old way asks nobody.
        const area = document.createElement("textarea");
        area.value = text;
        (document.querySelector("dialog[open]") || document.body).append(area);
        area.select();
        document.execCommand("copy");
        area.remove();
      }
      setDone(true);
    };
    return html`<button type="button" class="small" onClick=${copy} aria-live="polite">${done ? "Copied" : label}</button>`;
  };

  /** A file made here and saved by the browser. */
  DF.save = (name, text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/octet-stream" }));
    link.download = name;
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  };

  /** Text that came from outside: shown as it is, in its own direction, with half characters and controls made visible. */
  DF.Text = ({ text, tag = "span", cls = "" }) => {
    const shown = String(text ?? "").replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u2028\u2029]/g, "\ufffd");
    return preact.h(tag, { dir: "auto", class: `foreign ${cls}` }, shown.toWellFormed ? shown.toWellFormed() : shown);
  };
}
