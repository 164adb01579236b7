"use strict";
// What the page knows: the summary at once, everything else in scripts that are loaded when somebody looks.
const DF = { html: htm.bind(preact.h) };

{
  const { useEffect, useState } = preactHooks;
  const summary = dataflowReport.values.get("summary");
  const AT_ONCE = 12;
  // How many scripts of each kind stay in memory: thumbnails are large, tiles and columns are asked for again and again.
  const KEPT = { thumbs: 300, details: 60 };

  const wanted = new Map(); // name -> {promise, resolve, users}
  const waiting = []; // names, the latest last: what was just scrolled to is loaded first
  const recent = { thumbs: new Map(), details: new Map() };
  let loading = 0;

  const kindOf = (name) => name.slice(0, name.indexOf("/"));
  const fileOf = (name) => (kindOf(name) === "thumbs" ? `${name}.js` : `data/${name}.js`);

  function touch(name) {
    const kind = kindOf(name);
    if (!(kind in KEPT)) return;
    const order = recent[kind];
    order.delete(name);
    order.set(name, true);
    if (order.size > KEPT[kind]) {
      const oldest = order.keys().next().value;
      order.delete(oldest);
      dataflowReport.values.delete(oldest);
    }
  }

  function next() {
    while (loading < AT_ONCE && waiting.length) {
      const name = waiting.pop();
      const order = wanted.get(name);
      if (!order) continue;
      if (order.users <= 0) {
        wanted.delete(name); // scrolled past before its turn came
        continue;
      }
      loading += 1;
      const script = document.createElement("script");
      const done = () => {
        script.remove();
        loading -= 1;
        wanted.delete(name);
        if (!dataflowReport.values.has(name)) dataflowReport.values.set(name, null); // the file is gone
        touch(name);
        order.resolve(dataflowReport.values.get(name));
        next();
      };
      script.onload = done;
      script.onerror = done;
      script.src = fileOf(name);
      document.head.append(script);
    }
  }

  /** Start to load a script; returns [promise of its value (null where there is no such file), a function to give up]. */
  function ask(name) {
    let order = wanted.get(name);
    if (!order) {
      order = { users: 0 };
      order.promise = new Promise((resolve) => {
        order.resolve = resolve;
      });
      wanted.set(name, order);
      waiting.push(name);
    } else if (!order.users) {
      waiting.push(name);
    }
    order.users += 1;
    next();
    return [order.promise, () => (order.users -= 1)];
  }

  DF.load = (name) => {
    if (dataflowReport.values.has(name)) return Promise.resolve(dataflowReport.values.get(name));
    return ask(name)[0];
  };

  /** The value of a script, undefined until it is there. */
  DF.useData = (name) => {
    const [, again] = useState(0);
    const known = !name || dataflowReport.values.has(name);
    useEffect(() => {
      if (known) return undefined;
      let here = true;
      const [promise, giveUp] = ask(name);
      promise.then(() => here && again((count) => count + 1));
      return () => {
        here = false;
        giveUp();
      };
    }, [name, known]);
    if (name && known) touch(name);
    return name ? dataflowReport.values.get(name) : undefined;
  };

  const part = (kind, per) => (at) => [`${kind}/${Math.floor(at / per)}`, at % per];
  const places = {
    thumb: part("thumbs", summary.per.thumbs),
    tile: part("tiles", summary.per.tiles),
    detail: part("details", summary.per.details),
  };
  const useItem = (place) => (at) => {
    const [name, index] = at == null ? [null, 0] : place(at);
    const values = DF.useData(name);
    return values ? values[index] : values;
  };
  DF.useThumb = useItem(places.thumb);
  DF.useTile = useItem(places.tile);
  DF.useDetail = useItem(places.detail);
  const item = async (place, at) => {
    const [name, index] = place(at);
    const values = await DF.load(name);
    return values ? values[index] : null;
  };
  DF.detail = (at) => item(places.detail, at);
  DF.tile = (at) => item(places.tile, at);

  // Columns: numbers are {numbers}, everything else {values, codes} with -1 for nothing.
  const byKey = new Map(summary.columns.map((column) => [`${column.kind}:${column.name}`, column]));
  const decoded = new Map();
  DF.columnInfo = (key) => byKey.get(key);
  DF.column = (key) => {
    const info = byKey.get(key);
    if (!info) return Promise.resolve(null);
    if (!decoded.has(key)) {
      const name = `columns/${info.id}`;
      decoded.set(
        key,
        DF.load(name).then((data) => {
          dataflowReport.values.delete(name);
          if (!data) return null;
          if (info.type === "number") {
            return { info, numbers: Float64Array.from(data, (value) => (value === null ? NaN : value)) };
          }
          return { info, values: data.values, codes: Int32Array.from(data.codes) };
        }),
      );
    }
    return decoded.get(key);
  };

  DF.summary = summary;
  DF.states = summary.states;

  // Words ------------------------------------------------------------------------------------------------------------

  const whole = new Intl.NumberFormat("en");
  DF.count = (value) => whole.format(value);
  DF.plural = (value, one, many) => `${whole.format(value)} ${value === 1 ? one : many || `${one}s`}`;
  DF.number = (value) => {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    if (Number.isInteger(value)) return whole.format(value);
    const size = Math.abs(value);
    return size >= 1000 ? whole.format(Math.round(value)) : String(Number(value.toPrecision(4)));
  };
  DF.money = (value) => `$${value.toLocaleString("en", { minimumFractionDigits: 2, maximumFractionDigits: value && value < 1 ? 4 : 2 })}`;
  DF.percent = (part, all) => (all ? `${(Math.floor((1000 * part) / all) / 10).toFixed(1)} %` : "–");
  DF.duration = (seconds) => {
    if (seconds > 0 && seconds < 0.1) return `${Number((1000 * seconds).toPrecision(2))} ms`;
    if (seconds < 60) return `${seconds < 10 ? Number(seconds.toPrecision(2)) : Math.round(seconds)} s`;
    const minutes = Math.round(seconds / 60);
    return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  };
  DF.rate = (made, seconds) => {
    const each = made / Math.max(seconds, 0.001);
    const [value, per] = each >= 1 ? [each, "second"] : each * 60 >= 1 ? [each * 60, "minute"] : [each * 3600, "hour"];
    return `${value >= 10 ? whole.format(Math.round(value)) : Number(value.toPrecision(2))} pictures per ${per}`;
  };
  DF.bytes = (value) => {
    const units = ["B", "kB", "MB", "GB", "TB"];
    let at = 0;
    while (value >= 1000 && at < units.length - 1) {
      value /= 1000;
      at += 1;
    }
    return `${at ? value.toPrecision(3) : value} ${units[at]}`;
  };
  DF.stateNames = {
    kept: "kept",
    not_chosen: "not chosen",
    dropped: "dropped",
    incomplete: "row incomplete",
    refused: "refused",
    failed: "failed",
    waiting: "waiting",
    unreadable: "unreadable file",
    unscored: "without a score",
  };
  DF.plain = (word) => String(word || "").replace(/_/g, " ");
  // Reasons as filters count them, "score:judge.value", in words; the names of scores stay as they are.
  const WORDS = {
    score: (name) => `${name} outside the limits`,
    best: (name) => `others better by ${name}`,
    quarantined: (name) => `no ${name} to go by`,
    unknown: (name) => `no ${name} at all`,
  };
  DF.reason = (word) => {
    const [kind, name] = String(word || "").split(/:(.*)/);
    return name && kind in WORDS ? WORDS[kind](name) : DF.plain(word);
  };
  // Every entry that is shown somewhere belongs to a list, in which the keys for "before" and "after" move.
  DF.list = null;
}
