// Draws a Grafana board from answers of Prometheus, with the components that Grafana itself is made of.
//
// window.quire = {board, answers: {panel id: {refId: [{metric, values}]}}, from, to}; times in milliseconds.
// Heatmaps are not among the published components: theirs are drawn as a stack of what is in each bucket.
import { createRoot } from 'react-dom/client';
import { FieldType, ThemeContext, createTheme, dateTime, getDisplayProcessor, getMinMaxAndDelta, toDataFrame } from '@grafana/data';
import uplotStyle from 'uplot/dist/uPlot.min.css';
import { BarGauge, BigValue, GlobalStyles, PanelChrome, TimeSeries } from '@grafana/ui';

const CELL = 30; // pixels of a row of the grid
const GAP = 8;
const { board, answers, from, to } = window.quire;
const theme = createTheme({ colors: { mode: 'light' } });
const timeRange = { from: dateTime(from), to: dateTime(to), raw: { from: 'now-1m', to: 'now' } };

const legendOf = (target, metric) =>
  target.legendFormat.replace(/\{\{(\w+)\}\}/g, (_, label) => metric[label] ?? '') || target.expr;

const numberOf = (text) => (Number.isFinite(Number(text)) ? Number(text) : null); // as Grafana does: a gap

function framesOf(panel) {
  const series = panel.targets.flatMap((target) =>
    (answers[panel.id][target.refId] ?? []).map((one) => ({ name: legendOf(target, one.metric), values: one.values }))
  );
  return (panel.type === 'heatmap' ? bucketsOf(series) : series).map(({ name, values }, seriesIndex) => {
    const frame = toDataFrame({
      fields: [
        { name: 'Time', type: FieldType.time, values: values.map(([time]) => 1000 * time), config: {} },
        { name, type: FieldType.number, values: values.map(([, value]) => numberOf(value)), config: configOf(panel, name) },
      ],
    });
    for (const field of frame.fields) {
      field.display = getDisplayProcessor({ field, theme });
      field.state = { seriesIndex, displayName: field.name, range: getMinMaxAndDelta(field) };
    }
    return frame;
  });
}

// Of a histogram's cumulative counts by upper bound, what is in each bucket; empty ones left out.
function bucketsOf(series) {
  const bound = ({ name }) => (name === '+Inf' ? Infinity : Number(name));
  const rising = series.toSorted((one, other) => bound(one) - bound(other));
  const own = rising.map(({ name, values }, i) => {
    const below = new Map(rising[i - 1]?.values);
    return { name: `≤ ${name} s`, values: values.map(([time, value]) => [time, value - (below.get(time) ?? 0)]) };
  });
  return own.filter(({ values }) => values.some(([, value]) => value > 0));
}

const STACK = {
  unit: 'none',
  color: { mode: 'palette-classic' },
  custom: { fillOpacity: 60, lineWidth: 0, stacking: { mode: 'normal', group: 'A' } },
};
const LEGEND = { showLegend: true, displayMode: 'list', placement: 'right', calcs: [] };

const configOf = (panel, displayName) => ({
  color: { mode: 'palette-classic' },
  custom: {},
  ...structuredClone(panel.fieldConfig.defaults),
  ...(panel.type === 'heatmap' ? structuredClone(STACK) : {}),
  displayName,
});

const lastOf = (frame) => frame.fields[1].values.findLast((value) => Number.isFinite(value));
const shown = (frame) => ({ ...frame.fields[1].display(lastOf(frame)), title: frame.fields[1].name });

function Stat({ panel, frames, width, height }) {
  const sparkline = { y: frames[0].fields[1], x: frames[0].fields[0] };
  const { colorMode, graphMode, textMode } = panel.options;
  return <BigValue {...{ width, height, theme, sparkline, colorMode, graphMode, textMode }} value={shown(frames[0])} />;
}

function Bars({ panel, frames, width, height }) {
  const { orientation, displayMode } = panel.options;
  const each = Math.floor(width / frames.length) - GAP;
  return (
    <div style={{ display: 'flex', gap: GAP }}>
      {frames.map((frame) => (
        <BarGauge key={frame.fields[1].name} {...{ orientation, displayMode, theme, height }} width={each}
          field={{ min: 0, max: Math.max(...frames.map(lastOf)), ...frame.fields[1].config }}
          display={frame.fields[1].display} value={shown(frame)} />
      ))}
    </div>
  );
}

function Lines({ panel, frames, width, height }) {
  const legend = panel.type === 'heatmap' ? LEGEND : panel.options.legend;
  return <TimeSeries {...{ frames, width, height, timeRange, legend }} timeZone="utc" options={panel.options} />;
}

function Panel({ panel, column }) {
  const frames = framesOf(panel);
  const Drawn = { stat: Stat, bargauge: Bars }[panel.type] ?? Lines;
  const { w, h } = panel.gridPos;
  return (
    <PanelChrome title={panel.title} width={w * column - GAP} height={h * CELL - GAP}>
      {(width, height) => (frames.length ? <Drawn {...{ panel, frames, width, height }} /> : <p>No data</p>)}
    </PanelChrome>
  );
}

function Board() {
  const column = document.body.clientWidth / 24;
  const bottom = Math.max(...board.panels.map(({ gridPos }) => gridPos.y + gridPos.h));
  return (
    <ThemeContext.Provider value={theme}>
      <GlobalStyles />
      <style>{uplotStyle}</style>
      <div style={{ position: 'relative', height: bottom * CELL }}>
        {board.panels.map((panel) => (
          <div key={panel.id} data-panel={panel.title}
            style={{ position: 'absolute', left: panel.gridPos.x * column, top: panel.gridPos.y * CELL }}>
            {panel.type === 'row' ? <h4>{panel.title}</h4> : <Panel panel={panel} column={column} />}
          </div>
        ))}
      </div>
    </ThemeContext.Provider>
  );
}

createRoot(document.getElementById('board')).render(<Board />);
