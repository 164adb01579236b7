"use strict";
// The first screen: how many, what was lost and why, what it cost, are the pictures good.
{
  const { html } = DF;
  const { useState } = preactHooks;

  const LOST = ["refused", "failed", "dropped", "not_chosen", "incomplete"];
  /** The conditions of a filter in words. */
  DF.ruleOf = ({ thresholds }) => {
    if (!thresholds.score) return "";
    const { minimum, maximum, top_k: best, drop_lowest_share: share } = thresholds;
    const rules = [
      minimum !== undefined && `≥ ${minimum}`,
      maximum !== undefined && `≤ ${maximum}`,
      share !== undefined && `without the lowest ${Math.round(100 * share)} %`,
      best !== undefined && `best ${best}`,
    ];
    return `${thresholds.score} ${rules.filter(Boolean).join(", ")}`;
  };

  const sum = (counts) => counts.reduce((total, each) => total + each, 0);
  const lostBy = (losses, state) => sum(losses.filter((each) => each[1] === state).map((each) => each[3]));

  /** Where entries lost for one reason are to be seen. */
  const filterOf = (run, [, state, reason]) => {
    const filters = { "picture:state": { in: [state] } };
    if (reason) filters["picture:reason"] = { in: [reason] };
    if (DF.summary.runs.length > 1) filters["picture:run"] = { in: [run.name] };
    return DF.link("gallery", { filters });
  };

  /** The sum as the command line says it. */
  function Sum({ run }) {
    const parts = LOST.map((state) => [lostBy(run.losses, state), DF.stateNames[state]]).filter(([count], at) => count || at < 3);
    const waiting = run.finished ? [] : [[run.pending, "pending"]];
    return html`<p class="sum">
      ${DF.plural(run.rows, "row")}${run.gained ? ` + ${DF.count(run.gained)} made from them` : ""} =${" "}
      <b>${DF.count(run.kept)} kept</b>
      ${[...parts, ...waiting].map(([count, name]) => html` + <span class=${count ? "" : "quiet"}>${DF.count(count)} ${name}</span>`)}
      ${run.unaccounted !== 0 && html` <strong class="wrong">${run.unaccounted > 0 ? `+ ${DF.count(run.unaccounted)} that no later table has: run the job again` : `and ${DF.count(-run.unaccounted)} more in the tables than went in`}</strong>`}
    </p>`;
  }

  function PictureSum({ run }) {
    const { made, kept, losses } = run.pictures;
    const states = [...new Set(losses.map((each) => each[1]))];
    return html`<p class="sum">
      ${DF.plural(sum(made.map((each) => each[1])), "picture")} = <b>${DF.count(kept)} kept</b>
      ${states.map((state) => html` + <span>${DF.count(lostBy(losses, state))} ${DF.stateNames[state]}</span>`)}
    </p>`;
  }

  function Figures({ run }) {
    const made = sum(run.pictures.made.map((each) => each[1]));
    const per = run.kept ? `${DF.money(run.usd / run.kept)} per kept row` : "";
    return html`<dl class="figures">
      <div class="card">
        <dt>Rows kept</dt>
        <dd>${DF.count(run.finished ? run.kept : run.so_far)} <small>of ${DF.count(run.rows + run.gained)}</small></dd>
        <dd class="note">${run.finished ? DF.percent(run.kept, run.rows + run.gained) : html`not finished: ${DF.count(run.pending)} pending`}</dd>
      </div>
      <div class="card">
        <dt>Pictures made</dt>
        <dd>${DF.count(made)}</dd>
        <dd class="note">${DF.count(run.pictures.kept)} in the final table</dd>
      </div>
      <div class="card">
        <dt>Spent</dt>
        <dd>${DF.money(run.usd)}</dd>
        <dd class="note">${run.unpriced ? `and ${DF.plural(run.unpriced, "call")} of unknown price` : run.usd ? per : "nothing was charged"}</dd>
      </div>
      <div class="card">
        <dt>Time</dt>
        <dd>${DF.duration(run.seconds)}</dd>
        <dd class="note">${made ? `${DF.rate(made, run.seconds)}` : "of all runs"}</dd>
      </div>
    </dl>`;
  }

  /** What is left after each step: of rows, or of pictures. */
  function stagesOf(run, what) {
    const stages = [];
    let left = what === "rows" ? run.rows : 0;
    if (what === "rows") stages.push({ name: "Rows in", left, gained: 0, losses: [] });
    else {
      const given = run.pictures.made.find(([step]) => step === 0);
      if (given) stages.push({ name: "Pictures in", left: (left = given[1]), gained: 0, losses: [] });
    }
    const of = what === "rows" ? run.losses : run.pictures.losses;
    for (const step of run.steps) {
      const losses = of.filter((each) => each[0] === step.number);
      const made = run.pictures.made.find(([number]) => number === step.number);
      const gained = what === "rows" ? step.gained : made ? made[1] : 0;
      left += gained - sum(losses.map((each) => each[3]));
      const nothing = what === "rows" && !run.finished && !step.finished;
      stages.push({ step, name: step.operator, left, gained, losses, nothing });
    }
    return stages;
  }

  function Funnel({ run }) {
    const [what, setWhat] = useState(run.losses.length || !run.pictures.losses.length ? "rows" : "pictures");
    const stages = stagesOf(run, what);
    const most = Math.max(1, ...stages.map((stage) => stage.left));
    const id = `funnel-${run.name}`;
    return html`<section class="card funnel" aria-labelledby=${id}>
      <header>
        <h2 id=${id}>What became of them</h2>
        <div class="switch" role="group" aria-label="Count">
          ${["rows", "pictures"].map((each) => html`<button type="button" aria-pressed=${what === each} onClick=${() => setWhat(each)}>${each}</button>`)}
        </div>
      </header>
      <table>
        <thead class="unseen"><tr><th scope="col">Step</th><th scope="col">Left after it</th><th scope="col">Lost in it</th></tr></thead>
        <tbody>
          ${stages.map(
            (stage) => html`<tr>
              <th scope="row">${stage.step && html`<span class="quiet">${stage.step.number}</span> `}${stage.name}
                ${stage.step && html`<small class="quiet">${[stage.step.model, DF.ruleOf(stage.step)].filter(Boolean).join(" · ")}</small>`}</th>
              <td class="left">
                <span class="bar"><i style=${{ width: `${(100 * Math.max(0, stage.left)) / most}%` }}></i></span>
                <b>${stage.nothing ? "…" : DF.count(stage.left)}</b>
              </td>
              <td class="lost">
                ${stage.gained > 0 && html`<span class="gain">+${DF.count(stage.gained)} made</span>`}
                ${stage.losses.map((loss) => html`<a class=${`loss ${loss[1]}`} href=${filterOf(run, loss)}>−${DF.count(loss[3])} ${DF.stateNames[loss[1]]}${loss[2] && loss[2] !== loss[1] ? `: ${DF.reason(loss[2])}` : ""}</a>`)}
                ${stage.nothing && html`<span class="quiet">${stage.step.begun ? "not finished" : "not begun"}</span>`}
              </td>
            </tr>`,
          )}
        </tbody>
      </table>
      ${what === "rows" ? html`<${Sum} run=${run} />` : html`<${PictureSum} run=${run} />`}
    </section>`;
  }

  function Samples({ run }) {
    if (!run.samples.length) return null;
    return html`<section class="card samples" aria-labelledby=${`samples-${run.name}`}>
      <header>
        <h2 id=${`samples-${run.name}`}>A sample of what was kept</h2>
        <a href=${DF.link("gallery", { filters: { "picture:state": { in: ["kept"] } } })}>all kept</a>
      </header>
      <div class="strip">${run.samples.map((at) => html`<${DF.Tile} key=${at} at=${at} list=${run.samples} caption=${false} />`)}</div>
    </section>`;
  }

  function Steps({ run }) {
    const seconds = sum(run.steps.map((step) => step.seconds));
    return html`<section aria-labelledby=${`steps-${run.name}`}>
      <h2 id=${`steps-${run.name}`}>Steps</h2>
      <div class="scroll card" tabindex="0" role="region" aria-label="Steps as a table">
        <table class="steps">
          <thead>
            <tr>${["Step", "Rows", "Done", "Refused", "Failed", "Dropped", "Pending", "Pictures", "Time", "Spent"].map((name) => html`<th scope="col">${name}</th>`)}</tr>
          </thead>
          <tbody>
            ${run.steps.map(
              (step) => html`<tr class=${step.begun ? "" : "quiet"}>
                <th scope="row"><span class="quiet">${step.number}</span> ${step.operator}
                  <small class="quiet">${[step.model, step.score && `→ ${step.score}`, DF.ruleOf(step)].filter(Boolean).join(" ")}</small></th>
                ${["rows", "done", "refused", "failed", "dropped", "pending", "images"].map(
                  (name) => html`<td class=${step[name] ? (["refused", "failed", "dropped"].includes(name) ? `loss-${name}` : "") : "quiet"}>${step[name] === null ? "–" : DF.count(step[name])}</td>`,
                )}
                <td title=${step.requests ? `${DF.count(step.requests)} answers took ${DF.duration(step.request_seconds)} together` : ""}>
                  <span class="time"><i style=${{ width: `${seconds ? (100 * step.seconds) / seconds : 0}%` }}></i></span>${DF.duration(step.seconds)}</td>
                <td>${step.usd || step.unpriced ? `${DF.money(step.usd)}${step.unpriced ? " + ?" : ""}` : "–"}</td>
              </tr>`,
            )}
          </tbody>
          <tfoot><tr><th scope="row">together</th><td colspan="6"></td><td>${DF.count(sum(run.steps.map((step) => step.images)))}</td><td>${DF.duration(run.seconds)}</td><td>${DF.money(run.usd)}</td></tr></tfoot>
        </table>
      </div>
      <p class="quiet">In each step rows = done + refused + failed + dropped + pending. A refused or failed row stays in the table, without a picture. Time is that of all runs.</p>
    </section>`;
  }

  // A filter drops rows on purpose: what nobody wanted comes first.
  const meant = (problem) => problem.kind === "dropped" || problem.kind === "waiting";
  const bySeverity = (problems) => [...problems].sort((a, b) => meant(a) - meant(b) || b.count - a.count);

  function Worst({ run, number }) {
    const found = bySeverity(DF.summary.problems.filter((each) => each.run === number));
    if (!found.length) return html`<p class="fine card">Nothing was refused, failed or dropped, and every picture has its scores.</p>`;
    return html`<section class="card worst" aria-labelledby=${`worst-${run.name}`}>
      <header><h2 id=${`worst-${run.name}`}>What went wrong</h2><a href="#problems">all ${found.length}</a></header>
      <ul>${found.slice(0, 4).map((each) => html`<li><${DF.ProblemLine} problem=${each} /></li>`)}</ul>
    </section>`;
  }

  function Runs() {
    const runs = DF.summary.runs;
    return html`<section aria-labelledby="runs">
      <h2 id="runs">Runs</h2>
      <div class="scroll card" tabindex="0" role="region" aria-label="Runs as a table">
        <table class="steps">
          <thead><tr>${["Run", "Rows in", "Kept", "Lost", "Pending", "Pictures", "Spent", "Time"].map((name) => html`<th scope="col">${name}</th>`)}</tr></thead>
          <tbody>${runs.map(
            (run, number) => html`<tr>
              <th scope="row"><a href=${`#run-${number}`} onClick=${(event) => { event.preventDefault(); document.getElementById(`run-${number}`).scrollIntoView(); }}>${run.name}</a></th>
              <td>${DF.count(run.rows + run.gained)}</td><td>${DF.count(run.kept)}</td><td>${DF.count(sum(run.losses.map((each) => each[3])))}</td>
              <td>${DF.count(run.pending)}</td><td>${DF.count(sum(run.pictures.made.map((each) => each[1])))}</td><td>${DF.money(run.usd)}</td><td>${DF.duration(run.seconds)}</td>
            </tr>`,
          )}</tbody>
        </table>
      </div>
    </section>`;
  }

  DF.Overview = () => {
    const { runs, notes } = DF.summary;
    return html`<div class="overview">
      ${runs.length > 1 && html`<${Runs} />`}
      ${runs.map(
        (run, number) => html`<article id=${`run-${number}`} key=${run.name}>
          ${runs.length > 1 && html`<h2 class="run-name">${run.name}</h2>`}
          ${!run.finished && html`<p class="warning card">This run has not finished: what is here is what there was when the report was written.</p>`}
          <${Figures} run=${run} />
          <div class="halves"><${Funnel} run=${run} /><${Samples} run=${run} /></div>
          <${Worst} run=${run} number=${number} />
          <${Steps} run=${run} />
        </article>`,
      )}
      <${DF.Charts} />
      ${notes.length > 0 && html`<section><h2>Notes</h2><ul>${notes.map((note) => html`<li><${DF.Text} text=${note} /></li>`)}</ul></section>`}
    </div>`;
  };

  // Problems -----------------------------------------------------------------------------------------------------------

  const problemLink = (problem) => {
    const run = DF.summary.runs[problem.run];
    const filters = {};
    if (DF.summary.runs.length > 1) filters["picture:run"] = { in: [run.name] };
    if (problem.kind === "unscored") filters["picture:unscored"] = { text: problem.reason };
    else if (problem.kind === "unreadable") filters["picture:file"] = { in: [problem.reason] };
    else {
      filters["picture:state"] = { in: [problem.kind] };
      if (problem.reason !== problem.kind) filters["picture:reason"] = { in: [problem.reason] };
    }
    return DF.link("gallery", { filters });
  };

  DF.ProblemLine = ({ problem }) => html`<a class="problem" href=${problemLink(problem)}>
    <b class="many">${DF.count(problem.count)}</b> <span class="quiet">${problem.pictures === problem.count ? (problem.count === 1 ? "picture" : "pictures") : problem.count === 1 ? "row" : "rows"}</span> <${DF.State} state=${problem.kind} /> <span>${problem.reason === problem.kind ? "" : DF.reason(problem.reason)}</span>
    ${problem.step > 0 && html`<small class="quiet">step ${problem.step} ${problem.operator}</small>`}
  </a>`;

  DF.Problems = () => {
    const { problems, runs } = DF.summary;
    if (!problems.length) return html`<p class="fine card">Nothing was refused, failed or dropped; every picture can be read and has its scores.</p>`;
    return html`<div class="problems">
      <p class="quiet">Every row that was lost and every picture that is not whole, by reason. A failure never counts as a success: all of them are also in the gallery.</p>
      ${bySeverity(problems).map(
        (problem) => html`<section class="card" key=${`${problem.run}${problem.kind}${problem.step}${problem.reason}`}>
          <h2><${DF.ProblemLine} problem=${problem} /></h2>
          ${runs.length > 1 && html`<p class="quiet">${runs[problem.run].name}</p>`}
          ${problem.messages.map((message) => html`<${DF.Text} tag="p" cls="message" text=${message} />`)}
          <div class="strip">${problem.first.map((at) => html`<${DF.Tile} key=${at} at=${at} list=${problem.first} />`)}</div>
          ${problem.count > problem.first.length && html`<a href=${problemLink(problem)}>all ${DF.count(problem.count)} in the gallery</a>`}
        </section>`,
      )}
    </div>`;
  };
}
