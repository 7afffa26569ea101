import { describe, expect, test } from 'vitest';
import type { Entry } from '../../src/exportd/entry.js';
import { planReload, type ReloadPlan } from '../../src/exportd/plan.js';
import type { ScannedFile } from '../../src/exportd/scan.js';
import type { ExportDefinition } from '../../src/exports/index.js';
import { AppError } from '../../src/lib/errors.js';

function definition(name: string, imagePath = '/disk'): ExportDefinition {
  return {
    ...{ name, imagePath, format: 'raw', isReadOnly: true, sizeBytes: null, description: null },
    ...{ materialize: false, own: null },
  };
}

function scanned(file: string, content: ScannedFile['content'], modifiedMs = 1): ScannedFile {
  return { file, digest: `digest of ${file}`, modifiedMs, content };
}

function summary({ entries, add, remove }: ReloadPlan): Record<string, string[]> {
  const files = (list: Iterable<Entry>): string[] => [...list].map(({ file }) => file);
  const failed = files([...entries.values()].filter(({ error }) => error !== null));
  return { all: files(entries.values()), add: files(add), remove: files(remove), failed };
}

const NOTHING = new Map<string, Entry>();

describe('planReload', () => {
  test('adds what is new, keeps what is served, removes what is gone', () => {
    const first = planReload(NOTHING, [
      scanned('a.conf', definition('a')),
      scanned('b.conf', definition('b')),
    ]);
    expect(summary(first)).toEqual({
      all: ['a.conf', 'b.conf'],
      add: ['a.conf', 'b.conf'],
      remove: [],
      failed: [],
    });
    const second = planReload(first.entries, [
      scanned('b.conf', definition('b')),
      scanned('c.conf', definition('c')),
    ]);
    expect(summary(second)).toEqual({
      all: ['b.conf', 'c.conf'],
      add: ['c.conf'],
      remove: ['a.conf'],
      failed: [],
    });
    expect(second.entries.get('b.conf')).toBe(first.entries.get('b.conf'));
  });

  test('a change is a removal and an addition; a file that became bad is a removal', () => {
    const { entries } = planReload(NOTHING, [scanned('a.conf', definition('a'))]);
    const changed = planReload(entries, [scanned('a.conf', definition('a', '/other'))]);
    expect(summary(changed)).toEqual({ all: ['a.conf'], add: ['a.conf'], remove: ['a.conf'], failed: [] });
    const bad = planReload(entries, [scanned('a.conf', new AppError('INVALID_INPUT', 'bad'))]);
    expect(summary(bad)).toEqual({ all: ['a.conf'], add: [], remove: ['a.conf'], failed: ['a.conf'] });
  });

  test('that an image is to stand alone is no change of what is served', () => {
    const { entries } = planReload(NOTHING, [scanned('a.conf', definition('a'))]);
    const asked = planReload(entries, [scanned('a.conf', { ...definition('a'), materialize: true })]);
    expect(summary(asked)).toEqual({ all: ['a.conf'], add: [], remove: [], failed: [] });
    expect(asked.entries.get('a.conf')).toBe(entries.get('a.conf'));
    expect(asked.entries.get('a.conf')?.definition?.materialize).toBe(true);
  });

  test('what failed is tried again', () => {
    const first = planReload(NOTHING, [scanned('a.conf', definition('a'))]);
    for (const entry of first.add) Object.assign(entry, { error: new AppError('NOT_FOUND', 'no image') });
    const again = planReload(first.entries, [scanned('a.conf', definition('a'))]);
    expect(summary(again)).toEqual({ all: ['a.conf'], add: ['a.conf'], remove: [], failed: [] });
  });

  test('of several files with one name the one served has it, else the oldest, else the first', () => {
    const files = [
      scanned('a.conf', definition('x'), 3),
      scanned('b.conf', definition('x'), 1),
      scanned('c.conf', definition('x'), 1),
    ];
    const fresh = planReload(NOTHING, files);
    expect(summary(fresh)).toMatchObject({ add: ['b.conf'], failed: ['a.conf', 'c.conf'] });
    expect(fresh.entries.get('c.conf')?.error?.message).toBe('the name x is taken by b.conf');
    const { entries } = planReload(NOTHING, [scanned('a.conf', definition('x'), 3)]);
    expect(summary(planReload(entries, files))).toMatchObject({
      add: [],
      remove: [],
      failed: ['b.conf', 'c.conf'],
    });
  });

  test('a name goes over to another file when its own goes', () => {
    const files = [scanned('a.conf', definition('x'), 1), scanned('b.conf', definition('x', '/b'), 2)];
    const { entries } = planReload(NOTHING, files);
    const next = planReload(entries, files.slice(1));
    expect(summary(next)).toEqual({ all: ['b.conf'], add: ['b.conf'], remove: ['a.conf'], failed: [] });
  });
});
