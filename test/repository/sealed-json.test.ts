import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { z } from 'zod';
import { canonicalJson, sealJson, unsealJson } from '../../repository/sealed-json.js';

const schema = z.record(z.string(), z.unknown());

describe('sealed JSON', () => {
  it('has one canonical form whatever the order of keys', () => {
    expect(canonicalJson({ b: 1, a: { d: [1, { y: 1, x: 2 }], c: 'ü' } })).toBe(
      '{"a":{"c":"ü","d":[1,{"x":2,"y":1}]},"b":1}',
    );
    expect(canonicalJson({ a: undefined, b: null })).toBe('{"b":null}');
  });

  it('gives back what was sealed, for any object', () => {
    fc.assert(
      fc.property(fc.dictionary(fc.string(), fc.jsonValue({ maxDepth: 5 })), (value) => {
        const body = Object.fromEntries(Object.entries(value).filter(([key]) => key !== 'digest'));
        const result = unsealJson(sealJson(body), schema);
        expect(result.ok).toBe(true);
        if (result.ok) expect(canonicalJson(result.value)).toBe(canonicalJson(body));
      }),
    );
  });

  it('notices every changed byte that changes the content', () => {
    const data = sealJson({ name: 'vm', size: 12345, list: [1, 2, 3] });
    const original = canonicalJson({ name: 'vm', size: 12345, list: [1, 2, 3] });
    for (let at = 0; at < data.length; at += 1) {
      for (const bit of [1, 2, 4, 16, 64]) {
        const changed = Buffer.from(data);
        changed[at] = (changed[at] ?? 0) ^ bit;
        const result = unsealJson(changed, schema);
        if (result.ok) expect(canonicalJson(result.value)).toBe(original);
      }
    }
  });

  it.each([
    '',
    'null',
    '[]',
    '1',
    '{',
    '{"digest":1}',
    '['.repeat(100_000),
    '{"a":'.repeat(5000),
    '{"__proto__":{"x":1}}',
  ])('answers a problem for %#, and does not throw', (text) => {
    expect(unsealJson(Buffer.from(text), schema)).toMatchObject({ ok: false });
  });
});
