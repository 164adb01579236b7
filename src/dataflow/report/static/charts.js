"use strict";
// How scores are distributed, with the thresholds of filters drawn in.
{
  const { html } = DF;
  const { useEffect, useRef, useState } = preactHooks;

  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  /** The limits that filters set on a score: [{value, words}]. */
  function limitsOf(name) {
    const found = new Map();
    for (const run of DF.summary.runs) {
      for (const step of run.steps) {
        if (step.thresholds.score !== name) continue;
        if ("minimum" in step.thresholds) found.set(`min${step.thresholds.minimum}`, { value: step.thresholds.minimum, words: `at least ${step.thresholds.minimum}` });
        if ("maximum" in step.thresholds) found.set(`max${step.thresholds.maximum}`, { value: step.thresholds.maximum, words: `at most ${step.thresholds.maximum}` });
      }
    }
    return [...found.values()];
  }

  const otherRules = (name) => {
    const found = [];
    for (const run of DF.summary.runs) {
      for (const step of run.steps) {
        if (step.thresholds.score !== name) continue;
        if ("top_k" in step.thresholds) found.push(`best ${step.thresholds.top_k} of each row`);
        if ("drop_lowest_share" in step.thresholds) found.push(`without the lowest ${Math.round(100 * step.thresholds.drop_lowest_share)} %`);
      }
    }
    return [...new Set(found)];
  };

  /** Counts of a chart by bin: of one run kept and lost, of several one line each. */
  function linesOf(chart) {
    const runs = DF.summary.runs;
    const at = (number, part) => chart.counts[`${number}:${part}`];
    if (runs.length === 1) {
      return [
        { name: "kept", colour: "--kept", counts: at(0, "kept") },
        { name: "lost", colour: "--lost", counts: at(0, "lost") },
      ].filter((line) => line.counts.some(Boolean));
    }
    return runs.map((run, number) => ({
      name: run.name,
      colour: `--run${(number % 4) + 1}`,
      counts: at(number, "kept").map((count, bin) => count + at(number, "lost")[bin]),
    }));
  }

  const binName = (chart, bin) =>
    chart.values ? DF.number(chart.values[bin]) : `${DF.number(chart.edges[bin])} to ${DF.number(chart.edges[bin + 1])}`;

  function draw(holder, chart, width, onSelect) {
    const lines = linesOf(chart);
    const bins = lines[0].counts.length;
    const stacked = DF.summary.runs.length === 1;
    const places = chart.values ? chart.values.map((_, bin) => bin) : chart.edges.slice(0, -1).map((edge, bin) => (edge + chart.edges[bin + 1]) / 2);
    // Lines lie over one another: those of one run are added up from the last to the first.
    const heights = lines.map((line, number) =>
      line.counts.map((count, bin) => (stacked ? lines.slice(number).reduce((sum, each) => sum + each.counts[bin], 0) : count)),
    );
    const limits = limitsOf(chart.name);
    const step = chart.edges ? chart.edges[1] - chart.edges[0] : 1;
    const scale = chart.edges ? [chart.edges[0] - step / 2, chart.edges[bins] + step / 2] : [-0.6, bins - 0.4];
    const around = limits.filter(() => chart.edges).map((limit) => limit.value);
    const range = [Math.min(scale[0], ...around), Math.max(scale[1], ...around)];
    const ink = style("--faint");
    const grid = { stroke: style("--line"), width: 1 };
    const place = (value) => {
      if (!chart.values) return value;
      const exact = chart.values.indexOf(value);
      if (exact >= 0) return exact - 0.5;
      const above = chart.values.findIndex((each) => each > value);
      return (above < 0 ? bins : above) - 0.5;
    };
    const bars = uPlot.paths.bars({ size: [0.92, 80], align: 0 });
    const spline = uPlot.paths.stepped({ align: 0 });
    return new uPlot(
      {
        width,
        height: 150,
        padding: [14, 20, 0, 0],
        legend: { show: false },
        cursor: { y: false, points: { show: false }, drag: { x: Boolean(chart.edges), y: false, setScale: false } },
        scales: { x: { time: false, range }, y: { range: (_, low, high) => [0, Math.max(1, high) * (limits.length ? 1.2 : 1.05)] } },
        axes: [
          {
            stroke: ink,
            grid: { show: false },
            ticks: { ...grid, size: 4 },
            font: "12px system-ui, sans-serif",
            size: 28,
            ...(chart.values
              ? { splits: () => places, values: () => chart.values.map((value) => DF.number(value)) }
              : { values: (_, splits) => splits.map((value) => (value === null ? "" : DF.number(value))) }),
          },
          { stroke: ink, grid, ticks: { show: false }, size: 44, font: "12px system-ui, sans-serif", incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 1e6], values: (_, splits) => splits.map((value) => DF.count(value)) },
        ],
        series: [
          {},
          ...lines.map((line) => ({
            label: line.name,
            stroke: style(line.colour),
            fill: stacked ? style(line.colour) : undefined,
            width: stacked ? 0 : 2,
            paths: stacked ? bars : spline,
            points: { show: false },
          })),
        ],
        hooks: {
          draw: [
            (plot) => {
              const { ctx, bbox } = plot;
              ctx.save();
              ctx.strokeStyle = style("--ink");
              ctx.fillStyle = style("--ink");
              ctx.font = `${12 * devicePixelRatio}px system-ui, sans-serif`;
              ctx.lineWidth = 1.5 * devicePixelRatio;
              ctx.setLineDash([5 * devicePixelRatio, 4 * devicePixelRatio]);
              for (const limit of limits) {
                const x = plot.valToPos(place(limit.value), "x", true);
                ctx.beginPath();
                ctx.moveTo(x, bbox.top - 4 * devicePixelRatio);
                ctx.lineTo(x, bbox.top + bbox.height);
                ctx.stroke();
                const right = x < bbox.left + bbox.width * 0.7;
                ctx.textAlign = right ? "left" : "right";
                ctx.fillText(limit.words, x + (right ? 5 : -5) * devicePixelRatio, bbox.top + 2 * devicePixelRatio);
              }
              ctx.restore();
            },
          ],
          setSelect: [
            (plot) => {
              if (plot.select.width < 3) return;
              const low = plot.posToVal(plot.select.left, "x");
              const high = plot.posToVal(plot.select.left + plot.select.width, "x");
              plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
              onSelect(Number(low.toPrecision(4)), Number(high.toPrecision(4)));
            },
          ],
        },
      },
      [places, ...heights],
      holder,
    );
  }

  DF.Chart = ({ chart }) => {
    const [holder, width] = DF.useWidth();
    const canvas = useRef(null);
    const theme = DF.useTheme();
    const lines = linesOf(chart);
    const limits = limitsOf(chart.name);
    const rules = [...limits.map((limit) => limit.words), ...otherRules(chart.name)];
    const total = lines.reduce((sum, line) => sum + line.counts.reduce((a, b) => a + b, 0), 0);
    const key = `score:${chart.name}`;
    useEffect(() => {
      if (!width || !canvas.current) return undefined;
      const show = (low, high) => DF.go("gallery", { filters: { [key]: { min: low, max: high } } });
      const plot = draw(canvas.current, chart, width, show);
      return () => plot.destroy();
    }, [chart, width, theme]);
    const words = `Distribution of ${chart.name} over ${DF.plural(total, "picture")}${rules.length ? `; filters keep ${rules.join(", ")}` : ""}. The same as a table below.`;
    return html`<figure class="chart card" ref=${holder}>
      <figcaption>
        <h3>${chart.name}</h3>
        <p class="quiet">
          ${lines.map((line) => html`<span class="key"><i class=${line.colour.slice(2)}></i>${line.name} ${DF.count(line.counts.reduce((a, b) => a + b, 0))}</span>`)}
          ${rules.length > 0 && html`<span>kept: ${rules.join(", ")}</span>`}
        </p>
      </figcaption>
      <div class="plot" ref=${canvas} role="img" aria-label=${words}></div>
      <div class="below">
        <details>
          <summary>As a table</summary>
          <div class="scroll" tabindex="0" role="region" aria-label=${`${chart.name} as a table`}>
            <table>
              <thead>
                <tr><th scope="col">${chart.name}</th>${lines.map((line) => html`<th scope="col">${line.name}</th>`)}</tr>
              </thead>
              <tbody>
                ${lines[0].counts.map(
                  (_, bin) =>
                    lines.some((line) => line.counts[bin]) &&
                    html`<tr><th scope="row">${binName(chart, bin)}</th>${lines.map((line) => html`<td>${DF.count(line.counts[bin])}</td>`)}</tr>`,
                )}
              </tbody>
            </table>
          </div>
        </details>
        <a href=${DF.link("gallery", { sort: key, down: true })}>best first</a>
        <a href=${DF.link("gallery", { sort: key })}>worst first</a>
      </div>
    </figure>`;
  };

  DF.Charts = () => {
    const [all, setAll] = useState(false);
    const ruled = (chart) => limitsOf(chart.name).length + otherRules(chart.name).length > 0;
    const varied = (chart) => (chart.values ? chart.values.length > 1 : true);
    const charts = [...DF.summary.charts].sort((a, b) => ruled(b) - ruled(a) || varied(b) - varied(a));
    if (!charts.length) return null;
    const first = charts.filter((chart) => ruled(chart) || varied(chart)).slice(0, 4);
    const shown = all || !first.length ? charts : first;
    return html`<section aria-labelledby="scores">
      <h2 id="scores">Scores</h2>
      <p class="quiet">Dashed lines are the thresholds of filters. Drag over a range to see its pictures.</p>
      <div class="charts">${shown.map((chart) => html`<${DF.Chart} key=${chart.name} chart=${chart} />`)}</div>
      ${charts.length > shown.length && html`<button type="button" onClick=${() => setAll(true)}>Show all ${charts.length} scores</button>`}
    </section>`;
  };
}
