import { defineConfig } from 'eslint/config';
import tseslint from 'typescript-eslint';

/** Functions that stand where the process begins: they alone read its environment and end it. */
const ENTRY_POINTS = [
  'src/main.ts',
  'src/cli/main.ts',
  'src/exportd/main.ts',
  'src/config/**/*.ts',
  'src/lib/process.ts',
  'repository/rescue-main.ts',
];
const CLOCKS = ['src/lib/clock.ts', 'src/lib/id.ts'];
const PRODUCT = ['src/**/*.ts', 'repository/**/*.ts', 'native/lib/**/*.ts'];
const TESTS = ['test/**/*.ts', 'integration/**/*.ts'];
const OUTSIDE = [...TESTS, 'scripts/**/*.ts', '*.config.ts'];

const NO_PROCESS = [
  { object: 'process', property: 'env', message: 'Settings come from src/config, as plain values.' },
  { object: 'process', property: 'exit', message: 'Only an entry point ends the process; throw instead.' },
];
const NO_RAW_CLOCK = [
  { object: 'Date', property: 'now', message: 'Time comes from the injected Clock of src/lib/clock.ts.' },
];
const NO_DATE_WITHOUT_ARGUMENT = {
  selector: 'NewExpression[callee.name="Date"][arguments.length=0]',
  message: 'Time comes from the injected Clock of src/lib/clock.ts.',
};
/** The faults that eslint finds without types and typescript-eslint does not look for. */
const CORE_RULES = {
  'no-case-declarations': 'error',
  'no-cond-assign': 'error',
  'no-control-regex': 'error',
  'no-constant-binary-expression': 'error',
  'no-constant-condition': ['error', { checkLoops: false }],
  'no-empty': 'error',
  'no-fallthrough': 'error',
  'no-loss-of-precision': 'error',
  'no-self-assign': 'error',
  'no-self-compare': 'error',
  'no-sparse-arrays': 'error',
  'no-unsafe-finally': 'error',
  'no-unsafe-optional-chaining': 'error',
  'no-useless-catch': 'error',
  'no-useless-escape': 'error',
  'no-var': 'error',
  'prefer-const': 'error',
  eqeqeq: 'error',
};
const NO_DEFAULT_EXPORT = { selector: 'ExportDefaultDeclaration', message: 'Named exports only.' };

export default defineConfig(
  {
    ignores: [
      'dist/',
      'quickstart-data/',
      'coverage/',
      '.test-output/',
      'native/build/',
      'src/api/generated.d.ts',
    ],
  },
  { rules: CORE_RULES },
  {
    files: ['**/*.ts'],
    extends: [tseslint.configs.strictTypeChecked],
    languageOptions: { parserOptions: { projectService: true, tsconfigRootDir: import.meta.dirname } },
    linterOptions: { reportUnusedDisableDirectives: 'error' },
    rules: {
      '@typescript-eslint/no-floating-promises': 'error',
      '@typescript-eslint/no-misused-promises': 'error',
      '@typescript-eslint/only-throw-error': 'error',
      '@typescript-eslint/no-explicit-any': 'error',
      // `await using _server = …` is there to be disposed of.
      '@typescript-eslint/no-unused-vars': ['error', { ignoreUsingDeclarations: true }],
      '@typescript-eslint/switch-exhaustiveness-check': [
        'error',
        { considerDefaultExhaustiveForUnions: true, requireDefaultForNonUnion: true },
      ],
      '@typescript-eslint/explicit-function-return-type': ['error', { allowExpressions: true }],
      '@typescript-eslint/consistent-type-imports': 'error',
      // `newId<VmId>()` brands what it returns; the brand is the point of the parameter.
      '@typescript-eslint/no-unnecessary-type-parameters': 'off',
      // Numbers in messages are exact bytes and counts; nothing is lost by printing them.
      '@typescript-eslint/restrict-template-expressions': ['error', { allowNumber: true }],
      'max-lines': ['error', { max: 400, skipBlankLines: false, skipComments: false }],
      'max-lines-per-function': ['error', { max: 60, skipComments: true }],
      'max-params': ['error', 3],
    },
  },
  {
    files: PRODUCT,
    rules: {
      'no-console': 'error',
      'no-restricted-properties': ['error', ...NO_PROCESS, ...NO_RAW_CLOCK],
      'no-restricted-syntax': ['error', NO_DATE_WITHOUT_ARGUMENT, NO_DEFAULT_EXPORT],
    },
  },
  {
    files: ENTRY_POINTS,
    rules: { 'no-restricted-properties': ['error', ...NO_RAW_CLOCK] },
  },
  {
    files: CLOCKS,
    rules: { 'no-restricted-properties': ['error', ...NO_PROCESS] },
  },
  {
    // A describe block is one function; what is asserted about types is often known better than the compiler does.
    files: OUTSIDE,
    rules: {
      'max-lines-per-function': 'off',
      // A table of cases hands each column to its test as a parameter.
      'max-params': 'off',
      '@typescript-eslint/explicit-function-return-type': 'off',
      '@typescript-eslint/no-non-null-assertion': 'off',
      '@typescript-eslint/no-confusing-void-expression': 'off',
      '@typescript-eslint/require-await': 'off',
      '@typescript-eslint/unbound-method': 'off',
    },
  },
  {
    files: ['**/*.mjs', '**/*.cjs', '**/*.js'],
    languageOptions: { globals: { process: 'readonly', module: 'writable', console: 'readonly' } },
  },
);
