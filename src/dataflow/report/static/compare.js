"use strict";
// The same prompt in several runs, side by side; and blind, with a person's choice written to a file.
{
  const { html } = DF;
  const { useEffect, useRef, useState } = preactHooks;
  const { runs } = DF.summary;

  /** Pictures by prompt: [{members: [entries of run 0, of run 1, …]}], only those that more than one run has. */
  async function prompts() {
    const [group, run, column, file, state] = await Promise.all(
      ["system:group", "system:run", "picture:column", "picture:file", "picture:state"].map(DF.column),
    );
    const ok = file ? file.values.indexOf("ok") : -1;
    const kept = state ? state.values.indexOf("kept") : -1;
    const groups = new Map();
    for (let at = 0; at < DF.summary.count; at += 1) {
      const key = group.numbers[at];
      if (!groups.has(key)) groups.set(key, { members: runs.map(() => []), of: new Map() });
      groups.get(key).members[run.numbers[at]].push(at);
    }
    const isPicture = (at) => file && file.codes[at] === ok;
    const columnOf = (at) => (column && column.codes[at] >= 0 ? column.values[column.codes[at]] : "");
    const isKept = (at) => state && state.codes[at] === kept;
    return { groups: [...groups.values()], isPicture, columnOf, isKept };
  }

  function usePrompts() {
    const [found, setFound] = useState(null);
    useEffect(() => {
      let here = true;
      prompts().then((each) => here && setFound(each));
      return () => {
        here = false;
      };
    }, []);
    return found;
  }

  function Prompt({ members }) {
    const first = members.find((each) => each.length);
    const detail = DF.useDetail(first[0]);
    const all = members.flat();
    return html`<section class="group"><h3><${DF.Text} text=${detail ? detail.prompt || "no prompt" : "…"} /></h3>
      <div class="beside">${members.map(
        (of, number) => html`<div><p class="quiet"><i class=${`run${(number % 4) + 1}`}></i> ${runs[number].name}</p>
          ${of.length ? html`<div class="wrap">${of.slice(0, 12).map((at) => html`<${DF.Tile} key=${at} at=${at} list=${all} caption=${false} />`)}</div>` : html`<p class="none">nothing</p>`}
        </div>`,
      )}</div></section>`;
  }

  function SideBySide({ found }) {
    const holder = useRef(null);
    const groups = found.groups.filter((each) => each.members.filter((of) => of.length).length > 1);
    const virtual = DF.useVirtual(groups.length, 260, holder, "compare");
    if (!groups.length) return html`<p class="fine card">No prompt is in more than one of these runs.</p>`;
    return html`<p class="quiet">${DF.plural(groups.length, "prompt")} in more than one run.</p>
      <div ref=${holder} style=${{ height: `${virtual.getTotalSize()}px`, position: "relative" }}>
      ${virtual.getVirtualItems().map(
        (row) => html`<div key=${row.key} data-index=${row.index} class="line" ref=${(node) => virtual.measureElement(node)} style=${{ transform: `translateY(${row.start - virtual.options.scrollMargin}px)` }}>
          <${Prompt} members=${groups[row.index].members} />
        </div>`,
      )}</div>`;
  }

  // Blind ----------------------------------------------------------------------------------------------------------------

  /** Numbers from 0 to 1 that a seed decides, so that a reload asks in the same order (mulberry32). */
  function random(seed) {
    return () => {
      seed = (seed + 0x6d2b79f5) | 0;
      let mixed = Math.imul(seed ^ (seed >>> 15), 1 | seed);
      mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
      return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
    };
  }

  function shuffled(items, draw) {
    const result = [...items];
    for (let at = result.length - 1; at > 0; at -= 1) {
      const other = Math.floor(draw() * (at + 1));
      [result[at], result[other]] = [result[other], result[at]];
    }
    return result;
  }

  /** Pairs of pictures of one prompt and column: one of each run, or two of the same run. */
  function pairsOf(found, one, other) {
    const pairs = [];
    for (const { members } of found.groups) {
      const lists = [one, other].map((number) => {
        const pictures = members[number].filter(found.isPicture);
        const chosen = pictures.filter(found.isKept);
        return one !== other && chosen.length ? chosen : pictures;
      });
      const columns = new Set(lists[0].map(found.columnOf));
      for (const column of columns) {
        const [mine, theirs] = lists.map((list) => list.filter((at) => found.columnOf(at) === column));
        if (one === other) for (let at = 0; at + 1 < mine.length; at += 2) pairs.push([mine[at], mine[at + 1]]);
        else for (let at = 0; at < Math.min(mine.length, theirs.length); at += 1) pairs.push([mine[at], theirs[at]]);
      }
    }
    return pairs;
  }

  const store = `dataflow-report ${runs.map((run) => run.folder).join(" ")} ${DF.summary.count}`;
  const remembered = () => {
    try {
      return JSON.parse(localStorage.getItem(store)) || {};
    } catch {
      return {};
    }
  };
  const remember = (value) => {
    try {
      localStorage.setItem(store, JSON.stringify(value));
    } catch {
      // Private windows keep nothing: then the choices last as long as the page.
    }
  };

  function Side({ at, side, choose }) {
    const detail = DF.useDetail(at);
    return html`<button type="button" class="side" aria-label=${`the ${side} picture is better`} onClick=${choose}>
      ${detail ? html`<${DF.Original} at=${at} link=${detail.link} alt=${`${side} picture`} />` : html`<span class="blank"></span>`}
    </button>`;
  }

  function Question({ pair, answer }) {
    const detail = DF.useDetail(pair[0]);
    const instruction = detail && detail.file.prompt && detail.file.prompt !== detail.prompt ? detail.file.prompt : "";
    return html`<div>
      <h2 class="prompt"><${DF.Text} text=${detail ? detail.prompt || "no prompt" : "…"} /></h2>
      ${instruction && html`<p><${DF.Text} text=${instruction} /></p>`}
      <div class="sides-blind">
        <${Side} key=${`l${pair[0]}`} at=${pair[0]} side="left" choose=${() => answer("first")} />
        <${Side} key=${`r${pair[1]}`} at=${pair[1]} side="right" choose=${() => answer("second")} />
      </div>
    </div>`;
  }

  async function lineOf({ pair, choice, rater, at }) {
    const [first, second] = await Promise.all(pair.map(DF.detail));
    return JSON.stringify({
      first: first.path,
      second: second.path,
      choice,
      ...(rater ? { rater } : {}),
      prompt: first.prompt,
      first_run: runs[first.run].name,
      second_run: runs[second.run].name,
      blind: true,
      at,
    });
  }

  function Blind({ found, one, other }) {
    const [kept, setKept] = useState(() => ({ seed: Math.floor(Math.random() * 2 ** 31), rater: "", answers: {}, ...remembered() }));
    const [reveal, setReveal] = useState(false);
    const here = `${one}-${other}`;
    const answers = kept.answers[here] || [];
    const [pairs, setPairs] = useState([]);
    useEffect(() => {
      const draw = random(kept.seed);
      const all = shuffled(pairsOf(found, one, other), draw);
      setPairs(all.map(([a, b]) => (draw() < 0.5 ? [a, b] : [b, a])));
      setReveal(false);
    }, [found, one, other]);
    // Keys may come faster than the page is drawn: each counts from what the one before left, not from what is shown.
    const latest = useRef(kept);
    const save = (next) => {
      latest.current = next;
      setKept(next);
      remember(next);
    };
    const soFar = () => latest.current.answers[here] || [];
    const set = (list) => save({ ...latest.current, answers: { ...latest.current.answers, [here]: list } });
    const answer = (choice) => {
      const before = soFar();
      if (before.length < pairs.length) set([...before, { pair: pairs[before.length], choice, rater: latest.current.rater, at: new Date().toISOString() }]);
    };
    const undo = () => soFar().length && set(soFar().slice(0, -1));
    useEffect(() => {
      const keys = { ArrowLeft: () => answer("first"), ArrowRight: () => answer("second"), ArrowDown: () => answer("tie"), s: () => answer("skip"), Backspace: undo };
      const onKeyDown = (event) => {
        if (event.target.closest("input, select, textarea, dialog") || event.ctrlKey || event.metaKey || event.altKey) return;
        const act = keys[event.key];
        if (act) {
          event.preventDefault();
          act();
        }
      };
      document.addEventListener("keydown", onKeyDown);
      return () => document.removeEventListener("keydown", onKeyDown);
    });
    if (!pairs.length) return html`<p class="fine card">There are no two pictures of one prompt to choose between here.</p>`;
    const given = answers.filter((each) => each.choice !== "skip");
    const download = async () => {
      const lines = await Promise.all(given.map(lineOf));
      DF.save("choices.jsonl", lines.map((line) => `${line}\n`).join(""));
    };
    const current = pairs[answers.length];
    return html`<div class="blind">
      <div class="bar">
        <label>Your name <input value=${kept.rater} placeholder="optional" onInput=${(event) => save({ ...latest.current, rater: event.target.value })} /></label>
        <progress value=${answers.length} max=${pairs.length} aria-label="pairs seen"></progress>
        <span>${DF.count(answers.length)} of ${DF.count(pairs.length)}</span>
        <button type="button" disabled=${!answers.length} onClick=${undo}>Undo</button>
        <button type="button" class="main" disabled=${!given.length} onClick=${download}>Download ${DF.plural(given.length, "choice")}</button>
      </div>
      ${current
        ? html`<${Question} key=${answers.length} pair=${current} answer=${answer} />
            <div class="bar middle">
              <button type="button" onClick=${() => answer("first")}>← left is better</button>
              <button type="button" onClick=${() => answer("tie")}>↓ no difference</button>
              <button type="button" onClick=${() => answer("skip")}>skip (s)</button>
              <button type="button" onClick=${() => answer("second")}>right is better →</button>
            </div>`
        : html`<p class="fine card">That were all of them. Thank you!</p>`}
      <p class="quiet">Sides are shuffled and names hidden. The file is for <code>dataflow calibrate choices.jsonl --table ${DF.summary.scored}</code>, run in the report's folder.</p>
      ${given.length > 0 && (reveal ? html`<${Result} given=${given} one=${one} other=${other} />` : html`<button type="button" onClick=${() => setReveal(true)}>Show who won (not blind any more)</button>`)}
    </div>`;
  }

  function Result({ given, one, other }) {
    const [wins, setWins] = useState(null);
    useEffect(() => {
      DF.column("system:run").then((run) => {
        const counts = { tie: 0 };
        for (const { pair, choice } of given) {
          const key = choice === "tie" ? "tie" : run.numbers[pair[choice === "first" ? 0 : 1]];
          counts[key] = (counts[key] || 0) + 1;
        }
        setWins(counts);
      });
    }, [given]);
    if (!wins || one === other) return wins && html`<p>${DF.count(given.length - wins.tie)} decided, ${DF.count(wins.tie)} ties.</p>`;
    return html`<p>${runs[one].name} ${DF.count(wins[one] || 0)} · ${runs[other].name} ${DF.count(wins[other] || 0)} · ties ${DF.count(wins.tie)}</p>`;
  }

  const RunChoice = ({ label, value, onChange }) => html`<label>${label} <select value=${value} onChange=${(event) => onChange(Number(event.target.value))}>${runs.map((run, number) => html`<option value=${number}>${run.name}</option>`)}</select></label>`;

  DF.Compare = ({ state, change }) => {
    const found = usePrompts();
    const blind = runs.length === 1 || state.by === "blind";
    const [one, setOne] = useState(0);
    const [other, setOther] = useState(Math.min(1, runs.length - 1));
    if (!found) return html`<p class="loading">…</p>`;
    return html`<div class="compare">
      ${runs.length > 1 && html`<div class="bar">
        <div class="switch" role="group" aria-label="How to compare">
          <button type="button" aria-pressed=${!blind} onClick=${() => change({ by: "" })}>side by side</button>
          <button type="button" aria-pressed=${blind} onClick=${() => change({ by: "blind" })}>blind</button>
        </div>
        ${blind && html`<${RunChoice} label="Run" value=${one} onChange=${setOne} /><${RunChoice} label="against" value=${other} onChange=${setOther} />`}
      </div>`}
      ${blind ? html`<${Blind} found=${found} one=${one} other=${other} />` : html`<${SideBySide} found=${found} />`}
    </div>`;
  };
}
