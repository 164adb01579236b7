"use strict";
// Everything about one entry.
{
  const { html } = DF;
  const { useEffect, useRef, useState } = preactHooks;

  const HIDDEN = new Set(["prompt", "seed", "model", "revision", "params", "images", "image_hashes", "request_id", "negative_prompt", "size"]);

  /** An image file beside the report; where it is gone, its thumbnail says what it was. */
  function Original({ at, link, alt, slot }) {
    const [gone, setGone] = useState(false);
    useEffect(() => setGone(false), [link]);
    const webp = DF.useThumb(gone || !link ? at : null);
    const small = webp ? `data:image/webp;base64,${webp}` : "";
    if (!link && !webp) return html`<span slot=${slot} class="none">no file</span>`;
    return html`<img slot=${slot} class="original" src=${gone || !link ? small : link} alt=${alt} onError=${() => setGone(true)} />`;
  }
  DF.Original = Original;

  /** What a picture was made from, back to the first: [[at, link, path], …]. */
  async function ancestors(detail) {
    const found = [];
    const seen = new Set();
    let origin = detail.from[0];
    while (origin && !seen.has(origin[2])) {
      seen.add(origin[2]);
      found.push(origin);
      const before = origin[0] === null ? null : await DF.detail(origin[0]);
      origin = before && before.from[0];
    }
    return found;
  }

  async function rowMates(at, detail) {
    const [row, run] = await Promise.all([DF.column("system:row"), DF.column("system:run")]);
    if (!row) return [];
    const found = [];
    row.numbers.forEach((number, other) => {
      if (number === detail.row && run.numbers[other] === detail.run) found.push(other);
    });
    const details = await Promise.all(found.map(DF.detail));
    const rank = (each) => [each.made ? Number.parseInt(each.made, 10) : 0, each.place, each.turn];
    return found
      .map((other, number) => ({ at: other, detail: details[number] }))
      .filter((each) => each.detail)
      .sort((a, b) => rank(a.detail).reduce((done, value, number) => done || value - rank(b.detail)[number], 0));
  }

  function useLineage(at, detail) {
    const [found, setFound] = useState({ before: [], mates: [] });
    useEffect(() => {
      let here = true;
      setFound({ before: [], mates: [] });
      if (detail) {
        Promise.all([ancestors(detail), rowMates(at, detail)]).then(([before, mates]) => here && setFound({ before, mates }));
      }
      return () => {
        here = false;
      };
    }, [at, Boolean(detail)]);
    return found;
  }

  function Slider({ before, at, detail }) {
    const [chosen, setChosen] = useState(0);
    useEffect(() => setChosen(0), [at]);
    const origin = before[Math.min(chosen, before.length - 1)];
    const name = (number) => (number === before.length - 1 ? (before.length === 1 ? "before" : "the first picture") : number ? `${number + 1} turns before` : "the turn before");
    return html`<div class="slider">
      <img-comparison-slider tabindex="0" aria-label="before and after; arrow keys move the divider" key=${`${at}-${chosen}`}>
        <${Original} slot="first" at=${origin[0]} link=${origin[1]} alt="before" />
        <${Original} slot="second" at=${at} link=${detail.link} alt=${detail.prompt} />
      </img-comparison-slider>
      <p class="quiet sides"><span>← ${name(chosen)}</span>
        ${before.length > 1 && html`<label>compare with <select value=${chosen} onChange=${(event) => setChosen(Number(event.target.value))}>${before.map((_, number) => html`<option value=${number}>${name(number)}</option>`)}</select></label>`}
        <span>after →</span></p>
    </div>`;
  }

  function Picture({ at, detail, before }) {
    if (detail.problem || !detail.path) {
      return html`<div class=${`missing ${detail.state}`}>
        <b>${DF.plain(detail.problem ? detail.problem[0] : detail.reason || detail.state)}</b>
        <${DF.Text} tag="p" text=${detail.problem ? detail.problem[1] : detail.message} />
      </div>`;
    }
    if (before.length) return html`<${Slider} before=${before} at=${at} detail=${detail} />`;
    return html`<a href=${detail.link || undefined} target="_blank" rel="noreferrer"><${Original} at=${at} link=${detail.link} alt=${detail.prompt} /></a>`;
  }

  const Fact = ({ name, children }) => html`<div><dt>${name}</dt><dd>${children}</dd></div>`;
  const shown = (value) => (value !== null && typeof value === "object" ? JSON.stringify(value) : String(value));

  function Scores({ scores }) {
    if (!scores.length) return null;
    const lines = [];
    for (const [name, value, status, error, by] of scores) {
      if (status !== "ok") lines.push([name, html`<${DF.State} state="unscored" /> ${DF.plain(status)} <${DF.Text} text=${error} />`, by]);
      else if (value !== null && typeof value === "object" && !Array.isArray(value)) {
        for (const [field, each] of Object.entries(value)) lines.push([`${name}.${field}`, typeof each === "number" ? DF.number(each) : html`<${DF.Text} text=${shown(each)} />`, by]);
      } else lines.push([name, typeof value === "number" ? DF.number(value) : html`<${DF.Text} text=${shown(value)} />`, by]);
    }
    return html`<section><h3>Scores</h3><dl class="facts">${lines.map(([name, value, by]) => html`<div title=${by ? `by ${by}` : ""}><dt>${name}</dt><dd>${value}</dd></div>`)}</dl></section>`;
  }

  function Making({ detail }) {
    const { file } = detail;
    const params = Object.entries(file.params || {});
    return html`<section><h3>How it was made</h3>
      <dl class="facts">
        ${file.negative_prompt && html`<${Fact} name="negative prompt"><${DF.Text} text=${file.negative_prompt} /></${Fact}>`}
        ${detail.made && html`<${Fact} name="step">${detail.made}</${Fact}>`}
        ${file.model && html`<${Fact} name="model"><${DF.Text} text=${file.model} /></${Fact}>`}
        ${file.revision && html`<${Fact} name="revision"><code>${shown(file.revision)}</code></${Fact}>`}
        ${file.seed !== undefined && html`<${Fact} name="seed"><code>${shown(file.seed)}</code></${Fact}>`}
        ${params.map(([name, value]) => html`<${Fact} name=${name}><${DF.Text} text=${shown(value)} /></${Fact}>`)}
        ${detail.size && html`<${Fact} name="size">${detail.size[0]} × ${detail.size[1]}, ${DF.bytes(detail.size[2])}</${Fact}>`}
        ${detail.seconds !== null && html`<${Fact} name="time">${DF.duration(detail.seconds)}</${Fact}>`}
        ${detail.usd !== null && html`<${Fact} name="cost">${DF.money(detail.usd)}</${Fact}>`}
        ${Object.entries(file).filter(([name]) => !HIDDEN.has(name)).map(([name, value]) => html`<${Fact} name=${name}><${DF.Text} text=${shown(value)} /></${Fact}>`)}
      </dl>
      ${detail.command && html`<div class="command"><code>${detail.command}</code> <${DF.Copy} text=${detail.command} /></div><p class="quiet">makes this picture again and compares.</p>`}
    </section>`;
  }

  function Cells({ cells }) {
    const names = Object.keys(cells);
    if (!names.length) return null;
    return html`<details><summary><h3>The row's other cells</h3></summary><dl class="facts">${names.map((name) => html`<${Fact} name=${name}><${DF.Text} text=${cells[name]} /></${Fact}>`)}</dl></details>`;
  }

  function Lineage({ at, mates }) {
    if (mates.length < 2) return null;
    const list = mates.map((each) => each.at);
    const label = ({ detail }) => [detail.made ? detail.made.replace(/^(\d+) (Prompted)?(.*?)(Generator)?$/, "$1 $3") : "", detail.turn ? `turn ${detail.turn}` : ""].filter(Boolean).join(" · ");
    return html`<section><h3>The row's way through the steps</h3>
      <ol class="lineage">${mates.map((each) => html`<li class=${each.at === at ? "here" : ""}>
        <${DF.Tile} at=${each.at} list=${list} caption=${false} badge=${false} />
        <small>${label(each)}</small><${DF.State} state=${each.detail.state} />
      </li>`)}</ol></section>`;
  }

  function Inside({ at }) {
    const detail = DF.useDetail(at);
    const { before, mates } = useLineage(at, detail);
    if (detail === undefined) return html`<p class="loading">…</p>`;
    if (detail === null) return html`<p class="warning">This entry's file is missing from the report's data folder.</p>`;
    const why = detail.reason || detail.message;
    return html`<div class="inside">
      <div class="stage"><${Picture} at=${at} detail=${detail} before=${before} /></div>
      <div class="about">
        <p><${DF.State} state=${detail.state} />${detail.step && html` <span class="quiet">in step ${detail.step}</span>`}
          ${detail.state !== "kept" && why && html`<br /><b>${detail.reason === detail.state ? "" : DF.reason(detail.reason)}</b> <${DF.Text} text=${detail.message} />`}</p>
        <h2 class="prompt" id="detail-name"><${DF.Text} text=${detail.prompt || "no prompt"} /></h2>
        ${detail.file.prompt && detail.file.prompt !== detail.prompt && html`<p class="instruction"><span class="quiet">instruction</span> <${DF.Text} text=${detail.file.prompt} /></p>`}
        <p class="actions">${detail.prompt && html`<${DF.Copy} text=${detail.prompt} label="Copy prompt" />`}
        ${detail.path && html`<a class="button" href=${detail.link || undefined} aria-disabled=${!detail.link} target="_blank" rel="noreferrer">${detail.link ? "Original file" : detail.where || "file not found"}</a>`}</p>
        ${DF.summary.runs.length > 1 && html`<p class="quiet">run ${DF.summary.runs[detail.run].name}</p>`}
        <${Lineage} at=${at} mates=${mates} />
        <${Scores} scores=${detail.scores} />
        ${detail.path && html`<${Making} detail=${detail} />`}
        <${Cells} cells=${detail.cells} />
        ${detail.path && html`<p class="quiet path"><${DF.Text} text=${detail.path} /></p>`}
      </div>
    </div>`;
  }

  DF.Detail = ({ at, close, move }) => {
    const dialog = useRef(null);
    useEffect(() => {
      if (dialog.current && !dialog.current.open) dialog.current.showModal();
    }, []);
    useEffect(() => {
      if (dialog.current) dialog.current.scrollTop = 0;
    }, [at]);
    const onKeyDown = (event) => {
      if (event.target.closest("img-comparison-slider, input, select, textarea")) return;
      if (event.key === "ArrowRight") move(1);
      else if (event.key === "ArrowLeft") move(-1);
      else return;
      event.preventDefault();
    };
    const place = DF.placeOf(at);
    return html`<dialog ref=${dialog} class="detail" aria-labelledby="detail-name" onClose=${close} onKeyDown=${onKeyDown} onClick=${(event) => event.target === dialog.current && dialog.current.close()}>
      <div class="dialog-bar">
        <button type="button" aria-label="the one before" disabled=${place < 1} onClick=${() => move(-1)}>←</button>
        <button type="button" aria-label="the next one" disabled=${place < 0 || place >= DF.listLength() - 1} onClick=${() => move(1)}>→</button>
        <span class="quiet">${place >= 0 && `${DF.count(place + 1)} of ${DF.count(DF.listLength())}`}</span>
        <button type="button" class="close" autofocus aria-label="close" onClick=${() => dialog.current.close()}>✕</button>
      </div>
      <${Inside} at=${at} />
    </dialog>`;
  };
}
