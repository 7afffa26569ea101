import { expect, test } from 'vitest';
import { parseBenchOptions } from '../../scripts/lib/bench/options.js';
import { formatTable, mediansOf, type Result } from '../../scripts/lib/bench/report.js';
import { median, percentile } from '../../scripts/lib/bench/usage.js';
import { parseQuickstartOptions } from '../../scripts/lib/quickstart/options.js';

test('quickstart takes an NBD URI, an image by its extension, or a stated format', () => {
  const parse = (...args: string[]) => parseQuickstartOptions(args, '/base').source;
  expect(parse()).toBeNull();
  expect(parse('--source', 'nbd://h/x')).toEqual({ kind: 'nbd', uri: 'nbd://h/x' });
  expect(parse('--source', 'a.qcow2')).toEqual({ kind: 'image', path: '/base/a.qcow2', format: 'qcow2' });
  expect(parse('--source', '/d/disk', '--format', 'raw')).toEqual({
    kind: 'image',
    path: '/d/disk',
    format: 'raw',
  });
  expect(parse('--source', '/d/a.raw', '--format', 'qcow2')).toMatchObject({ format: 'qcow2' });
});

test.each([
  [['--source', '/d/disk']],
  [['--source', '/d/disk', '--format', 'vmdk']],
  [['--source', 'nbd://h/x', '--format', 'raw']],
  [['--port', '70000']],
  [['--port', 'x']],
  [['--no-such-option']],
  [['stray']],
])('quickstart refuses %j', (args) => {
  expect(() => parseQuickstartOptions(args, '/')).toThrow(expect.objectContaining({ code: 'INVALID_INPUT' }));
});

test('bench has the defaults of its help, and refuses nonsense', () => {
  expect(parseBenchOptions([])).toMatchObject({ diskGib: 8, dataGib: 2.3, runs: 5, directory: '/dev/shm' });
  expect(parseBenchOptions(['--help'])).toBe('help');
  expect(parseBenchOptions(['--only-api'])).toMatchObject({ isMainWanted: false, isApiWanted: true });
  expect(() => parseBenchOptions(['--runs', '0'])).toThrow(
    expect.objectContaining({ code: 'INVALID_INPUT' }),
  );
});

test('medians and percentiles', () => {
  expect(median([3, 1, 2])).toBe(2);
  expect(median([4, 1, 2, 3])).toBe(2.5);
  const hundred = Array.from({ length: 100 }, (_, index) => index + 1);
  expect(percentile(hundred, 0.99)).toBe(99);
  expect(percentile([7], 0.99)).toBe(7);
});

test('the table has the medians of each tool, and how Holdfast compares', () => {
  const result = (tool: Result['tool'], wallSeconds: number): Result => ({
    ...{ case: 'full', tool, wallSeconds, cpuSeconds: 1, peakRssBytes: 3 * 1024 * 1024 },
  });
  const results = [result('holdfast', 1), result('holdfast', 3), result('nbdcopy', 4)];
  expect(mediansOf(results).map((row) => row.wallSeconds)).toEqual([2, 4]);
  const lines = formatTable(results, 1024 * 1024).split('\n');
  expect(lines[2]).toBe('| full | holdfast | 2.00 | 1.00 | 3.0 MiB | 2.0 MiB |  |');
  expect(lines[3]).toBe('| full | nbdcopy | 4.00 | 1.00 | 3.0 MiB |  | 0.50 |');
});
