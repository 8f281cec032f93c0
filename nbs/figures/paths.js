// One series in one frame as two SVG paths: the line, and the markers on it. Only the
// first `count` points are drawn. Python's `_paths` does the same for the first frame.
function paths(series, frame, count, [left, top, xScale, yScale]) {
  const x = inFrame(series.x, frame), y = inFrame(series.y, frame);
  let line = '', marks = '', point = '', pen = 'M';
  for (let i = 0; i < x.length && i < count; i++) {
    // a gap lifts the pen
    if (x[i] === GAP || y[i] === GAP) { pen = 'M'; continue; }
    // on the screen y points down
    point = left + xScale * (x[i] - LOW) + ' ' + (top + yScale * (LOW + SPAN - y[i]));
    if (series.line) { line += pen + point; pen = 'L'; }
    if (series.every && i % series.every === 0) marks += 'M' + point + series.mark;
  }
  // a walk has a large marker where it is now
  if (series.end && point) marks += 'M' + point + series.end;
  return [line, marks];
}
