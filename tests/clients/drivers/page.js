// What the pages of the browser's clients share: they say each thing by a line, which the test takes from `lines`.
window.lines = [];
window.say = (line) => window.lines.push(line);
