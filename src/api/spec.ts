import { existsSync, readFileSync } from 'node:fs';
import path from 'node:path';
import { parse } from 'yaml';
import { z } from 'zod';
import { AppError } from '../lib/errors.js';

const operationSchema = z.looseObject({
  operationId: z.string(),
  parameters: z.array(z.looseObject({ $ref: z.string().optional() })).default([]),
});
const specSchema = z.looseObject({
  servers: z.tuple([z.looseObject({ url: z.string() })]),
  paths: z.record(z.string(), z.record(z.enum(['get', 'post', 'delete']), operationSchema.optional())),
});

export interface SpecOperation {
  operationId: string;
  method: 'get' | 'post' | 'delete';
  /** With the base path, in the form of the specification: `/api/v1/runs/{id}`. */
  path: string;
  takesIdempotencyKey: boolean;
}

export interface Spec {
  /** Absolute path of openapi.yaml. */
  file: string;
  text: string;
  operations: SpecOperation[];
}

/** openapi.yaml lies at the root of the package, above the sources as above the compiled files. */
function findSpec(directory: string): string {
  const file = path.join(directory, 'openapi.yaml');
  if (existsSync(file)) return file;
  const parent = path.dirname(directory);
  if (parent === directory) throw new AppError('INTERNAL', 'openapi.yaml is not in the installation');
  return findSpec(parent);
}

/** Reads the specification; synchronous, called once at start. */
export function loadSpec(): Spec {
  const file = findSpec(import.meta.dirname);
  const text = readFileSync(file, 'utf8');
  const spec = specSchema.parse(parse(text));
  const operations = Object.entries(spec.paths).flatMap(([route, methods]) =>
    (['get', 'post', 'delete'] as const).flatMap((method) => {
      const operation = methods[method];
      if (operation === undefined) return [];
      return {
        operationId: operation.operationId,
        method,
        path: spec.servers[0].url + route,
        takesIdempotencyKey: operation.parameters.some(
          (parameter) => parameter.$ref === '#/components/parameters/IdempotencyKey',
        ),
      };
    }),
  );
  return { file, text, operations };
}
